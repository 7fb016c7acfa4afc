"""Handlers for instruction sets in the Alpaca layout of 2023.

Every answer is learned, and after every answer the end-of-sequence id, so that a model learns to stop. The system of
2023 learned no end unless `--append-eod` was given, and only the last answer of a conversation.
"""

from collections.abc import Sequence

from ascendspeed_data.errors import DataError
from ascendspeed_data.handlers.base import HandlerBase, Part, Record, Sample, text_in

SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step."
)
USER, ASSISTANT = "### Instruction:", "### Response:"
LAYOUT = f"\n{SYSTEM}\n{USER}\n{{user}}\n{ASSISTANT}\n{{assistant}}\n"

Turn = tuple[str, str]
"""What the user said, and the answer."""


def conversation(turns: Sequence[Turn], first_trained: int = 0, end_of_each: bool = True) -> Sample:
    """Lay out turns; those before `first_trained` are context, and end with the end-of-sequence id if `end_of_each`."""
    parts: list[Part] = []
    lead = f"\n{SYSTEM}\n"
    for number, (user, assistant) in enumerate(turns):
        trained = number >= first_trained
        parts += [Part(f"{lead}{USER}\n{user}\n{ASSISTANT}\n", False), Part(f"{assistant}\n", trained)]
        if end_of_each or number == len(turns) - 1:
            parts.append(Part(None, trained))
        lead = ""
    return Sample(tuple(parts))


class GeneralInstructionHandler(HandlerBase):
    """Alpaca records; the answer is learned."""

    name = "GeneralInstructionHandler"
    columns: Sequence[str] = ("instruction", "output")
    optional_columns = ("input",)
    summary = "Alpaca records; the answer is learned, and the end after it"
    template = LAYOUT.replace("{user}", "{instruction}\n{input}").replace("{assistant}", "{output}")
    example: Record = {"instruction": "Name a colour.", "input": "", "output": "Blue."}  # noqa: RUF012

    def samples(self, record: Record, tokenizer: object) -> list[Sample]:
        """Return the record as one sample."""
        user = text_in(record, "instruction") + "\n" + text_in(record, "input")
        return [conversation([(user, text_in(record, "output"))])]


class LeetcodePythonInstructionHandler(HandlerBase):
    """A programming problem; code and explanation are learned."""

    name = "LeetcodePythonInstructionHandler"
    columns = ("code_with_problem", "code_only", "explanation_only")
    summary = "a problem (what stands before the first code fence); code and explanation are learned"
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
    """Turns written into one text, `Human:...Assistant:...`; every answer is learned."""

    name = "BelleMultiTurnInstructionHandler"
    columns = ("instruction", "output")
    summary = "Human:/Assistant: turns in `instruction`, the last answer in `output`; every answer is learned"
    template = LAYOUT
    example: Record = {  # noqa: RUF012
        "instruction": "Human:Hello\nAssistant:Hi\nHuman:Bye\nAssistant:",
        "output": "Goodbye.",
    }

    def turns(self, record: Record) -> list[Turn]:
        """Take the turns apart.

        Raises:
            DataError: the text does not alternate, or does not end with `Assistant:`.
        """
        pieces = text_in(record, "instruction").split("Human:")
        if pieces[0].strip():
            raise DataError(
                f"column 'instruction' begins with {pieces[0][:30]!r}, not with 'Human:'; it must read "
                "'Human:...Assistant:...Human:...Assistant:'"
            )
        found: list[Turn] = []
        for number, piece in enumerate(pieces[1:], 1):
            user, separator, answer = piece.partition("Assistant:")
            if not separator:
                raise DataError(f"turn {number} of column 'instruction' has no 'Assistant:'")
            found.append((user.strip(), answer.strip()))
        if not found or found[-1][1]:
            raise DataError("column 'instruction' does not end with 'Assistant:', where the output belongs")
        return [*found[:-1], (found[-1][0], text_in(record, "output").strip())]

    def samples(self, record: Record, tokenizer: object) -> list[Sample]:
        """Return the conversation as one sample."""
        return [conversation(self.turns(record))]


class BelleMultiTurnInstructionHandler2023(BelleMultiTurnInstructionHandler):
    """As in 2023: only the last answer is learned, and only after it stands the end."""

    name = "BelleMultiTurnInstructionHandler2023"
    summary = "the rule of 2023: only the last answer is learned"

    def samples(self, record: Record, tokenizer: object) -> list[Sample]:
        """Return the conversation as one sample."""
        turns = self.turns(record)
        return [conversation(turns, first_trained=len(turns) - 1, end_of_each=False)]
