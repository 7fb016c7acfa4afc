"""Counts of the server in Prometheus' form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ascendspeed_infer.serve.engine_driver import EngineDriver

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What `/metrics` shows.

    Args:
        driver: of the engine.
    """

    def __init__(self, driver: EngineDriver) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "asd_requests", "Requests that were answered.", ("path", "status"), registry=registry
        )
        self.prompt_tokens = Counter("asd_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.completion_tokens = Counter("asd_completion_tokens", "Tokens of answers.", registry=registry)
        self.first_token_seconds = Histogram(
            "asd_first_token_seconds",
            "From a request to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "asd_request_seconds", "From a request to its last token.", buckets=SECONDS, registry=registry
        )
        engine = driver.engine
        for name, text, value in (
            ("asd_running_texts", "Texts that the engine runs.", lambda: engine.num_running),
            ("asd_waiting_texts", "Texts that wait for the engine.", lambda: driver.num_waiting),
            ("asd_preemptions", "Times a text had to leave the cache.", lambda: engine.num_preemptions),
            ("asd_cache_blocks", "Blocks of the key-value cache.", lambda: engine.num_blocks),
            ("asd_free_cache_blocks", "Blocks of it that hold nothing.", lambda: engine.free_blocks),
        ):
            Gauge(name, text, registry=registry).set_function(value)

    def text(self) -> bytes:
        """Return all counts."""
        return generate_latest(self._registry)
