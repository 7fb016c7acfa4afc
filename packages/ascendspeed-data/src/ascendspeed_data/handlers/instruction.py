"""Handlers for instruction sets in the Alpaca layout of the AscendSpeed of 2023.

The loss covers every answer and the end-of-sequence id after it, so that a model learns to stop. In 2023 it covered
only the last answer of a conversation, and the end-of-sequence id only with `--append-eod`.
"""

from collections.abc import Sequence

from ascendspeed_data.conversation import json_value
from ascendspeed_data.errors import DataError
from ascendspeed_data.fields import filled
from ascendspeed_data.handlers.base import HandlerBase
from ascendspeed_data.sample import Record, Sample, Segment, text_in

SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step."
)
USER, ASSISTANT = "### Instruction:", "### Response:"
LAYOUT = f"\n{SYSTEM}\n{USER}\n{{user}}\n{ASSISTANT}\n{{assistant}}\n"

Exchange = tuple[str, str]
"""A user message and its answer."""


def conversation(
    exchanges: Sequence[Exchange], first_trained: int = 0, end_of_each: bool = True, system: str = ""
) -> Sample:
    """Return a conversation as one sample.

    Args:
        exchanges: user messages with their answers.
        first_trained: exchanges before this index are context without loss.
        end_of_each: end every answer with the end-of-sequence id, not only the last.
        system: the system text; that of 2023 if empty.
    """
    segments: list[Segment] = []
    lead = f"\n{system or SYSTEM}\n"
    for number, (user, assistant) in enumerate(exchanges):
        trained = number >= first_trained
        segments += [
            Segment(f"{lead}{USER}\n{user}\n{ASSISTANT}\n", False),
            Segment(f"{assistant}\n", trained),
        ]
        if end_of_each or number == len(exchanges) - 1:
            segments.append(Segment(None, trained))
        lead = ""
    return Sample(tuple(segments))


def history_of(record: Record) -> list[Exchange]:
    """Return the earlier exchanges in the column `history`, decoded if they are held as JSON text.

    Raises:
        DataError: the column is not a list of pairs of texts.
    """
    history = record.get("history")
    if not filled(history):
        return []
    history = json_value(history, "column 'history'")
    if not isinstance(history, list) or not all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in history
    ):
        raise DataError("column 'history' is not a list of [question, answer]")
    return [(turn[0], turn[1]) for turn in history]


class GeneralInstructionHandler(HandlerBase):
    """Alpaca records, with loss on the answer and on those in `history`, as LLaMA-Factory learns them."""

    name = "GeneralInstructionHandler"
    columns: Sequence[str] = ("instruction", "output")
    optional_columns = ("input", "history", "system")
    refused_columns = ("query", "context")
    summary = "Alpaca records, with loss on every answer and the end-of-sequence id"
    template = LAYOUT.replace("{user}", "{instruction}\n{input}").replace("{assistant}", "{output}")
    example: Record = {"instruction": "Name a colour.", "input": "", "output": "Blue."}  # noqa: RUF012

    def samples(self, record: Record, tokenizer: object) -> list[Sample]:
        """Return the record as one sample."""
        user = text_in(record, "instruction") + "\n" + text_in(record, "input")
        exchanges = [*history_of(record), (user, text_in(record, "output"))]
        return [conversation(exchanges, system=text_in(record, "system"))]


class LeetcodePythonInstructionHandler(HandlerBase):
    """Programming problems, with loss on code and explanation."""

    name = "LeetcodePythonInstructionHandler"
    columns = ("code_with_problem", "code_only", "explanation_only")
    summary = "programming problems (the text before the first code fence), with loss on code and explanation"
    template = LAYOUT.replace("{assistant}", "{code_only}\n{explanation_only}")
    example: Record = {  # noqa: RUF012
        "code_with_problem": "Add two numbers.\n```python\ndef add(a, b): ...\n```",
        "code_only": "```python\ndef add(a, b):\n    return a + b\n```",
        "explanation_only": "The sum.",
    }

    def samples(self, record: Record, tokenizer: object) -> list[Sample]:
        """Return the record as one sample."""
        problem = text_in(record, "code_with_problem").split("```", maxsplit=1)[0].strip()
        answer = text_in(record, "code_only") + "\n" + text_in(record, "explanation_only")
        return [conversation([(problem, answer)])]


class BelleMultiTurnInstructionHandler(HandlerBase):
    """Conversations in one text, `Human:...Assistant:...`, with loss on every answer."""

    name = "BelleMultiTurnInstructionHandler"
    columns = ("instruction", "output")
    refused_columns = ("input",)
    summary = (
        "Human:/Assistant: turns in `instruction`, the last answer in `output`, with loss on every answer"
    )
    template = LAYOUT
    example: Record = {  # noqa: RUF012
        "instruction": "Human:Hello\nAssistant:Hi\nHuman:Bye\nAssistant:",
        "output": "Goodbye.",
    }

    def exchanges(self, record: Record) -> list[Exchange]:
        """Split the text into exchanges.

        Raises:
            DataError: the turns do not alternate, or the text does not end with `Assistant:`.
        """
        parts = text_in(record, "instruction").split("Human:")
        if parts[0].strip():
            raise DataError(
                f"column 'instruction' starts with {parts[0][:30]!r}, not with 'Human:'; it must read "
                "'Human:...Assistant:...Human:...Assistant:'"
            )
        found: list[Exchange] = []
        for number, part in enumerate(parts[1:], 1):
            user, separator, answer = part.partition("Assistant:")
            if not separator:
                raise DataError(f"turn {number} of column 'instruction' has no 'Assistant:'")
            found.append((user.strip(), answer.strip()))
        if not found or found[-1][1]:
            raise DataError(
                "column 'instruction' does not end with 'Assistant:', after which the output belongs"
            )
        return [*found[:-1], (found[-1][0], text_in(record, "output").strip())]

    def samples(self, record: Record, tokenizer: object) -> list[Sample]:
        """Return the conversation as one sample."""
        return [conversation(self.exchanges(record))]


class BelleMultiTurnInstructionHandler2023(BelleMultiTurnInstructionHandler):
    """The rule of 2023: loss on the last answer only, and one end-of-sequence id after it."""

    name = "BelleMultiTurnInstructionHandler2023"
    summary = "the rule of 2023: loss on the last answer only"

    def samples(self, record: Record, tokenizer: object) -> list[Sample]:
        """Return the conversation as one sample."""
        exchanges = self.exchanges(record)
        return [conversation(exchanges, first_trained=len(exchanges) - 1, end_of_each=False)]
