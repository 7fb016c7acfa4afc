"""What a user types and sees in a chat: messages of several lines, commands, thoughts, and calls of tools."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.small_files import read_json
from ascendspeed_infer.chat import Chat
from ascendspeed_infer.thinking import Part, ThoughtSplitter

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
QUIT = ("q", "quit", "exit")
CLEAR = ("clear", "new")
SAVE, LOAD, RESULT, HELP = "/save", "/load", "/result", "/help"
BLOCK = '"""'
"""Begins and ends a message of several lines."""

USER, ANSWER, MORE = "You >> ", "AscendSpeed: ", "... "
HELP_TEXT = f"""\
{", ".join(QUIT)}: quit.
{", ".join(CLEAR)}: begin a new conversation.
{BLOCK}: begin a message of several lines; the same ends it.
{SAVE} FILE: save the conversation, as a record of messages; {LOAD} FILE: go on with a saved one.
{RESULT} TEXT: give the result of the first call of a tool that has none.
Ctrl-C: stop an answer. Any other line is a message.
"""

Thinking = Literal["shown", "dimmed", "hidden"]
"""How thoughts before an answer are shown."""
Read = Callable[[str], str | None]
Write = Callable[[str], None]


def converse(chat: Chat, read: Read, write: Write, thinking: Thinking = "shown") -> None:
    """Ask and answer until the user quits.

    Args:
        chat: the conversation.
        read: shows a prompt and returns the user's line; `None` at the end of the input.
        write: shows text to the user.
        thinking: how thoughts before an answer are shown: as they are, dimmed, or not at all.
    """
    write(f"Quit with {', '.join(QUIT)}; begin a new conversation with {' or '.join(CLEAR)}; {HELP}: more.\n")
    while True:
        line = read(USER)
        if line is None or line.strip().lower() in QUIT:
            write("\n" if line is None else "")
            return
        text = line.strip()
        command, _, rest = text.partition(" ")
        if text.lower() == HELP:
            write(HELP_TEXT)
        elif text.lower() in CLEAR:
            chat.clear()
            write("A new conversation.\n")
        elif command in (SAVE, LOAD):
            _file_command(chat, command, rest.strip(), write)
        elif command == RESULT:
            if not chat.open_calls():
                write("[No call of a tool waits for a result.]\n")
            elif chat.add_result(rest.strip()):
                _answer(chat, None, write, thinking)
        elif text.startswith(BLOCK):
            _answer(chat, _block(text.removeprefix(BLOCK), read), write, thinking)
        elif text:
            _answer(chat, text, write, thinking)


def _block(first: str, read: Read) -> str:
    """Return a message of several lines, up to the mark that ends it or the end of the input."""
    lines, line = list[str](), first
    while True:
        if line.rstrip().endswith(BLOCK):
            lines.append(line.rstrip().removesuffix(BLOCK))
            break
        lines.append(line)
        following = read(MORE)
        if following is None:
            break
        line = following
    return "\n".join(lines).strip("\n")


def _file_command(chat: Chat, command: str, name: str, write: Write) -> None:
    try:
        if not name:
            raise ConfigError(f"{command} names no file; give {command} FILE")
        if command == SAVE:
            save_history(chat, Path(name))
            write(f"[{len(chat.messages)} messages are saved in {name}.]\n")
        else:
            load_history(chat, Path(name))
            write(f"[The conversation goes on after {len(chat.messages)} messages of {name}.]\n")
    except AscendSpeedError as error:
        write(f"[{error}]\n")


def save_history(chat: Chat, path: Path) -> None:
    """Save a conversation as one record of messages, in the form that `asd-data preprocess` reads.

    Raises:
        ConfigError: the file cannot be written.
    """
    record: dict[str, Any] = {"messages": chat.history()}
    if chat.tools is not None:
        record["tools"] = chat.tools
    try:
        path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another file") from None


def load_history(chat: Chat, path: Path) -> None:
    """Go on with a saved conversation, in place of the present one; tools stay those of the chat.

    Raises:
        DataError: the file is damaged, or the layout does not take its messages.
    """
    record = read_json(path, dict[str, Any], f"{LOAD} {path}", f"give a file that {SAVE} wrote")
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ConfigError(f"{path} has no list of messages; give a file that {SAVE} wrote")
    chat.go_on_with(messages)


def _answer(chat: Chat, text: str | None, write: Write, thinking: Thinking) -> None:
    before = chat.left_out_turns
    splitter = ThoughtSplitter()

    def show(parts: Sequence[Part]) -> None:
        for part, is_thought in parts:
            if not is_thought or thinking == "shown":
                write(part)
            elif thinking == "dimmed":
                write(f"{DIM}{part}{PLAIN}")

    try:
        write(ANSWER)
        last = None
        for token in chat.say(text):
            if last is None:
                splitter.is_open = chat.opened_thoughts
            show(splitter.feed(token.text))
            last = token
        show(splitter.end())
        write("\n")
        if last is not None and last.finish_reason == "length":
            write("[The answer reached its limit and was cut off.]\n")
        if chat.called is not None:
            write(f"[Calls of tools; answer each with {RESULT} TEXT:]\n{chat.called.shown()}")
    except KeyboardInterrupt:
        write("\n[Interrupted.]\n")
    except AscendSpeedError as error:
        write(f"\n[{error}]\n")
    if chat.left_out_turns > before:
        write(
            f"[The conversation is longer than the model's context: its first {chat.left_out_turns} turns are left "
            "out.]\n"
        )
