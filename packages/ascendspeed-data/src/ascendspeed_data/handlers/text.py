"""Handlers for pretraining: a record becomes documents of text."""

from ascendspeed_data.handlers.base import HandlerBase
from ascendspeed_data.sample import Record, text_in

ALPACA_PRETRAIN = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.USER: Below is an instruction that describes a task. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{inputs}"
    "### Response: ASSISTANT: {response}"
)
STACK_OVERFLOW = "In python, {title}\n### Question:\n{question_body}\n### Response:\n{answer_body}\n"


class GeneralPretrainHandler(HandlerBase):
    """Each column of `--json-key` is a document, unchanged."""

    name = "GeneralPretrainHandler"
    summary = "each column of --json-key, unchanged; one dataset per column"
    template = "{column}"
    example: Record = {"text": "Any text."}  # noqa: RUF012

    def texts(self, record: Record, key: str) -> list[str]:
        """Return the text of the column."""
        return [text_in(record, key)]


class AlpacaPretrainHandler(HandlerBase):
    """Alpaca records as a conversation in plain text; a record without input has no input section."""

    name = "AlpacaPretrainHandler"
    columns = ("instruction", "output")
    optional_columns = ("input",)
    summary = "Alpaca records as a conversation in plain text, with loss on every token"
    template = ALPACA_PRETRAIN
    example: Record = {"instruction": "Name a colour.", "input": "", "output": "Blue."}  # noqa: RUF012
    input_section = "### Input:\n{input}\n\n"
    no_input = ""

    def texts(self, record: Record, key: str) -> list[str]:
        """Return the record as one text."""
        given = text_in(record, "input")
        inputs = self.input_section.replace("{input}", given) if given else self.no_input
        before, _, after = self.template.partition("{instruction}")
        middle, _, last = after.partition("{inputs}")
        instruction, response = text_in(record, "instruction"), text_in(record, "output")
        return [before + instruction + middle + inputs + last.replace("{response}", response)]


class AlpacaPretrainHandler2023(AlpacaPretrainHandler):
    """The rule of 2023: a record without input contains `###None`."""

    name = "AlpacaPretrainHandler2023"
    summary = "the rule of 2023: a record without input contains '###None'"
    no_input = "###None\n\n"


class StackOverflowPythonPretrainHandler(HandlerBase):
    """Questions and answers about Python."""

    name = "StackOverflowPythonPretrainHandler"
    columns = ("title", "question_body", "answer_body")
    summary = "questions and answers about Python, with loss on every token"
    template = STACK_OVERFLOW
    example: Record = {  # noqa: RUF012
        "title": "How to add?",
        "question_body": "How do I add two numbers?",
        "answer_body": "Use +.",
    }

    def texts(self, record: Record, key: str) -> list[str]:
        """Return title, question and answer as one text."""
        title, question, answer = (text_in(record, column) for column in self.columns)
        return [f"In python, {title}\n### Question:\n{question}\n### Response:\n{answer}\n"]
