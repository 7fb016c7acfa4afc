"""Listen, answer, and end: on SIGTERM or Ctrl-C after the requests that are open, at once when the engine fails."""

import asyncio
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from ascendspeed_data import small_files
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.prompting import PromptLayout
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.serve.app import build_app
from ascendspeed_infer.serve.config import API_KEYS_VARIABLE, ServerConfig
from ascendspeed_infer.serve.engine_driver import EngineDriver
from ascendspeed_infer.serve.engine_loop import EngineLoop
from ascendspeed_infer.serve.metrics import Metrics
from ascendspeed_infer.serve.served_model import ServedModel, cache_size
from ascendspeed_infer.text_generator import TextGenerator

FAILURE_SECONDS = 5
"""For telling open requests that they were ended, or that the engine failed."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class DrainingServer(uvicorn.Server):
    """Takes no more requests once it is to end, and tells those that take too long.

    Args:
        config: of the server; after its `timeout_graceful_shutdown` connections are closed.
        driver: of the engine.
        drain_seconds: time for open requests.
    """

    def __init__(self, config: uvicorn.Config, driver: EngineDriver, drain_seconds: float) -> None:
        super().__init__(config)
        self._driver, self._drain_seconds = driver, drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let open requests end, and stop."""
        # What must wait for passes of the engine does so on a thread, while answers go on.
        closing = asyncio.get_running_loop().run_in_executor(None, self._driver.close, self._drain_seconds)
        await super().shutdown(sockets)
        await closing


@contextmanager
def prepared_server(
    name: str,
    model: TextGenerator,
    config: ServerConfig,
    say: Callable[[str], None],
    layout: PromptLayout | None = None,
    layout_for_tools: PromptLayout | None = None,
) -> Iterator[tuple[uvicorn.Server, socket.socket, ServedModel]]:
    """Take the address and start the engine; what is yielded has yet to be run.

    Args:
        name: of the model.
        model: on the rank that leads.
        config: where to listen, and what is allowed.
        say: where lines for the log go.
        layout: of conversations, if the model has a chat template.
        layout_for_tools: of those with tools, if it is another one.

    Raises:
        ConfigError: the address is not free, or the keys cannot be read.
    """
    keys = read_api_keys(config.api_key_file, os.environ.get(API_KEYS_VARIABLE, ""))
    engine = served_engine(model, config)
    if config.host not in LOOPBACK and not keys:
        say(f"warning: {config.host} may be reached by others, and no API key is asked for")

    def end(error: AscendSpeedError) -> None:
        say(f"error: {error}")
        server.should_exit = True

    if name in engine.adapter_names:
        raise ConfigError(f"lora_modules: {name} is the name of the model itself; give another")
    driver = EngineDriver(engine, config.max_queue, end)
    served = ServedModel(name, model, driver, config, Metrics(driver), say, layout, layout_for_tools)
    server = DrainingServer(
        uvicorn.Config(
            build_app(served, keys),
            log_level="warning",
            access_log=False,
            server_header=False,
            # Clients get time to hear that their requests were ended.
            timeout_graceful_shutdown=math.ceil(config.drain_seconds) + FAILURE_SECONDS,
        ),
        driver,
        config.drain_seconds,
    )
    with listening(config) as listener:
        driver.start()
        try:
            yield server, listener, served
        finally:
            driver.close(timeout_seconds=0)
            served.planner.shutdown(wait=False, cancel_futures=True)


def served_engine(model: TextGenerator, config: ServerConfig) -> EngineLoop:
    """Return the loop of the model's engine, ready to serve.

    Raises:
        ConfigError: the engine cannot do what is asked.
    """
    if isinstance(model, LanguageModel):
        engine = model.llm_engine
        if config.batch_invariant:
            engine.check_batch_invariance()
        tokens = cache_size(config, engine.max_model_len)
        engine.fix_cache(tokens, config.max_num_seqs, config.optimistic_admission)
        return engine
    from ascendspeed_infer.serve.vllm_loop import VllmLoop
    from ascendspeed_infer.vllm_engine import VllmEngine

    assert isinstance(model.engine, VllmEngine)
    for name in ("batch_invariant", "optimistic_admission", "cache_tokens", "max_num_seqs"):
        if getattr(config, name) != ServerConfig.model_fields[name].default:
            raise ConfigError(
                f"{name}: engine=vllm decides that itself; leave it out, or see --engine-option"
            )
    return VllmLoop(model.engine)


def run_server(
    name: str,
    model: TextGenerator,
    config: ServerConfig,
    say: Callable[[str], None],
    layout: PromptLayout | None = None,
    layout_for_tools: PromptLayout | None = None,
) -> None:
    """Answer requests until SIGTERM, Ctrl-C or a failure of the engine; see `prepared_server`.

    Raises:
        AscendSpeedError: the engine failed.
    """
    with prepared_server(name, model, config, say, layout, layout_for_tools) as (server, listener, served):
        host, port = listener.getsockname()[:2]
        say(f"serving {name} on http://{f'[{host}]' if ':' in host else host}:{port}")
        with quiet_signals():
            server.run(sockets=[listener])
    if served.driver.failure is not None:
        raise served.driver.failure


def read_api_keys(path: Path | None, variable: str) -> list[str]:
    """Return the keys of a file and of the environment.

    Raises:
        ConfigError: the file cannot be read, or has no key.
    """
    keys = [key.strip() for key in variable.split(",") if key.strip()]
    if path is None:
        return keys
    text = small_files.read_text(path, f"api_key_file={path}", "give one key per line", ConfigError)
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise ConfigError(f"api_key_file={path} has no key; give one key per line")
    return [*keys, *found]


@contextmanager
def listening(config: ServerConfig) -> Iterator[socket.socket]:
    """Take the address before anything is answered.

    Raises:
        ConfigError: it is taken, or not one of this machine.
    """
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"host={config.host} port={config.port} cannot be listened on: {error.strerror}; give another --port"
        ) from None
    with listener:
        yield listener


@contextmanager
def quiet_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT, which uvicorn raises again when it has ended, do nothing more."""
    numbers: Sequence[signal.Signals] = ()
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGTERM, signal.SIGINT)
    before = [(number, signal.signal(number, lambda *_: None)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
