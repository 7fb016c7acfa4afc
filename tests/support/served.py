"""A server on a free loopback port, in a thread of the test's own process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from ascendspeed_data.prompting import PromptLayout
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.serve.config import ServerConfig
from ascendspeed_infer.serve.served_model import ServedModel
from ascendspeed_infer.serve.server import prepared_server
from ascendspeed_infer.text_generator import TextGenerator


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        url: without path.
        client: asks it.
        served: its inside.
        log: lines that it printed.
    """

    url: str
    client: httpx.Client
    served: ServedModel
    log: list[str]

    def wait_until_idle(self, seconds: float = 30) -> None:
        """Wait until no request is open, and check that nothing was left in the cache."""
        driver, end = self.served.driver, time.monotonic() + seconds
        while driver.num_open or driver.engine.has_unfinished_requests():
            assert time.monotonic() < end, "requests are still open"
            time.sleep(0.005)
        assert driver.engine.num_running == 0
        kept = sum(one.slot.num_blocks for one in driver.engine._scheduler._finished)
        assert driver.engine.free_blocks + kept == driver.engine.num_blocks


@contextmanager
def running_server(
    model: TextGenerator, layout: PromptLayout | None = None, **options: Any
) -> Iterator[Running]:
    log: list[str] = []
    config = ServerConfig(**({"port": 0, "cache_tokens": 4096, "batch_invariant": True} | options))
    with prepared_server("tiny", model, config, log.append, layout) as (server, listener, served):
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                yield Running(url, client, served, log)
        finally:
            server.should_exit = True
            thread.join()
    if not isinstance(model, LanguageModel):
        return
    model.llm_engine.clear_prefix_cache()
    assert model.llm_engine.free_blocks == model.llm_engine.num_blocks
