"""`asd-infer serve`."""

import signal
import sys
from typing import TYPE_CHECKING, Any, cast

from ascendspeed_core.config.load import load_config
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.options import options_from
from ascendspeed_data.errors import AscendSpeedError, ConfigError, DataError
from ascendspeed_infer.commands.generate import launched_ranks, opened_model
from ascendspeed_infer.engines import NATIVE
from ascendspeed_infer.serve.config import ServeConfig

if TYPE_CHECKING:
    from ascendspeed_core.weights import WeightSource
    from ascendspeed_data.prompting import PromptLayout
    from ascendspeed_infer.text_generator import TextGenerator

VLLM = "vllm"
SECTIONS = [field.annotation for name, field in ServeConfig.model_fields.items() if name != "sampling"]
"""How texts are continued is said by each request."""


@options_from(*cast(list[Any], SECTIONS))
def serve(**given: Any) -> None:
    """Answer requests over HTTP, in the form of OpenAI's API, with the model of any checkpoint.

    SIGTERM and Ctrl-C end it after the requests that are open. Everything it prints goes to stderr.
    """
    config = load_config(ServeConfig, None, given)
    if config.engine.engine not in (NATIVE, VLLM):
        raise ConfigError(
            f"engine={config.engine.engine} cannot be served; give --engine {VLLM}, or leave --engine out"
        )
    try:
        import fastapi  # noqa: F401 - asked for before the model is loaded
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise AscendSpeedError(
            f"{error.name} is not installed; pip install ascendspeed-infer[serve]"
        ) from None
    with launched_ranks(config, sys.argv[1:]) as is_rank:
        if is_rank:
            run(config)


def run(config: ServeConfig) -> None:
    """Serve on the first rank; the others follow it."""
    from ascendspeed_core.launch import world_of_environment
    from ascendspeed_infer.serve.server import run_server

    if world_of_environment().rank > 0:
        # The launcher passes signals on to all ranks, and the first one still needs the others to drain.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    with opened_model(config) as opened:
        if opened is None:
            return
        model, source = opened
        path = source.path or config.source.model_config_file
        name = config.server.served_model_name or (path.resolve().name if path is not None else "model")
        run_server(name, model, config.server, log, *chosen_layouts(config, model, source))


def chosen_layouts(
    config: ServeConfig, model: "TextGenerator", source: "WeightSource"
) -> "tuple[PromptLayout | None, PromptLayout | None]":
    """Return the layout of conversations, and that of those with tools; `None`, with a line in the log, for a model
    that has none.
    """
    from ascendspeed_infer.chat import choose_layout

    values, template = config.conversation.template_values(), config.conversation.chat_template
    model.tokenizer.template_values = values
    try:
        layout = choose_layout(source, model.tokenizer, template)
        for_tools = choose_layout(source, model.tokenizer, template, lambda line: None, has_tools=True)
        # What a template lacks, such as a date, is said before the first request.
        layout.ids([{"role": "user", "content": "Hello"}])
    except (ConfigError, DataError) as error:
        if template is not None:
            raise
        log(f"/v1/chat/completions is not served: {error}")
        return None, None
    values.check_read({*layout.reads, *for_tools.reads})
    return layout, for_tools
