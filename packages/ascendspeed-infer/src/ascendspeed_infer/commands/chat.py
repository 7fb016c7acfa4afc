"""`asd-infer chat`."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendspeed_core.config.load import load_config
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.options import options_from
from ascendspeed_data.conversation import tools_of
from ascendspeed_data.errors import DataError
from ascendspeed_data.small_files import read_json
from ascendspeed_infer.commands.generate import launched_ranks, opened_model
from ascendspeed_infer.config import ChatConfig

if TYPE_CHECKING:
    from ascendspeed_infer.conversing import Thinking


@options_from(ChatConfig)
def chat(**given: Any) -> None:
    """Talk with the model of any checkpoint, in turns; answers appear as they grow.

    q, quit or exit ends; clear or new begins a new conversation; /help lists further commands; Ctrl-C stops an answer.
    """
    config = load_config(ChatConfig, None, given)
    with launched_ranks(config, sys.argv[1:]) as is_rank:
        if is_rank:
            run(config)


def run(config: ChatConfig) -> None:
    """Talk; the first rank reads and prints, the others follow it."""
    from ascendspeed_infer.chat import Chat, choose_layout
    from ascendspeed_infer.conversing import converse

    given = config.conversation.tools
    tools = None if given is None else read_tools(given)
    with opened_model(config) as opened:
        if opened is None:
            return
        model, source = opened
        values = config.conversation.template_values()
        model.tokenizer.template_values = values
        chosen = config.conversation.chat_template
        layout = choose_layout(source, model.tokenizer, chosen, has_tools=tools is not None)
        values.check_read(set(layout.reads))
        for line in config.sampling.ineffective_options():
            log(line)
        chat = Chat(model, layout, config.sampling, config.conversation.system, tools)
        shown: Thinking = "dimmed" if sys.stdout.isatty() else "shown"
        converse(chat, read_line, _write, "hidden" if config.conversation.hide_thinking else shown)


def read_tools(path: Path) -> list[Any]:
    """Return the tools of a JSON file.

    Raises:
        DataError: it cannot be read, or is not a list of objects.
    """
    return tools_of(read_json(path, list[dict[str, Any]], f"tools={path}", "give a JSON list of tools"))


def read_line(prompt: str) -> str | None:
    """Return the next line of stdin; `None` at its end, and when the user interrupts."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - lines can be edited, and earlier ones taken again
    else:
        _write(prompt)
        prompt = ""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        return None
    except UnicodeDecodeError as error:
        raise DataError(
            f"the input is not {error.encoding} ({error.reason} at byte {error.start}); give UTF-8"
        ) from None


def _write(text: str) -> None:
    print(text, end="", flush=True)
