"""Conversations that a model is trained on with one command, and held again in a chat: the same ids at each turn."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.weights import open_source
from ascendspeed_data.dataset import Dataset, open_dataset
from ascendspeed_data.prompting import PromptLayout, recorded_layout
from ascendspeed_data.template_values import TemplateValues
from ascendspeed_data.tokenizer import load_tokenizer
from ascendspeed_infer.chat import Chat, choose_layout
from ascendspeed_infer.config import AnswerConfig, SamplingConfig
from ascendspeed_infer.engine.sequence import CompletionOutput, TokenOutput
from ascendspeed_infer.engines import TokenRequest
from ascendspeed_infer.text_generator import TextGenerator
from support.chat_templates import Draw, Drawn, make_tokenizer, templates
from support.commands import call
from support.models import save_hugging_face, tiny_config
from support.records import json_lines


class Learned:
    """An engine that has learned its training samples by heart, and knows nothing else.

    Args:
        samples: ids and labels.
        vocab_size: of the tokenizer.
    """

    name = "learned"
    supported_options: frozenset[str] = frozenset()
    max_model_len = 1 << 20
    eos_token_ids: tuple[int, ...] = ()

    def __init__(self, samples: list[tuple[list[int], list[int]]], vocab_size: int) -> None:
        self._samples, self.vocab_size = samples, vocab_size
        self.unused = {
            (number, at)
            for number, (_, labels) in enumerate(samples)
            for at, label in enumerate(labels)
            if label != -100 and labels[at - 1] == -100
        }
        """Answers that were not asked for: the sample, and where each begins."""

    def stream(self, request: TokenRequest, config: SamplingConfig, session: Any) -> Iterator[TokenOutput]:
        """Answer as the sample does that begins with the prompt."""
        prompt = list(request.prompt_ids)
        at = len(prompt)
        found = [
            number
            for number, (ids, _) in enumerate(self._samples)
            if (number, at) in self.unused and ids[:at] == prompt
        ]
        assert found, "no sample has an answer after this prompt"
        self.unused.remove((found[0], at))
        _, labels = self._samples[found[0]]
        answer = labels[at : next((n for n in range(at, len(labels)) if labels[n] == -100), len(labels))]
        for token in answer[:-1]:
            yield TokenOutput(token, None, None)
        yield TokenOutput(answer[-1], None, "stop")

    def generate(self, requests: Any, config: SamplingConfig) -> Iterator[list[CompletionOutput]]:
        """Only chats are answered."""
        raise NotImplementedError

    def new_session(self) -> None:
        """Nothing is kept."""


def held(drawn: Drawn, engine: Learned, layout: PromptLayout) -> Chat:
    """Hold a conversation with what was trained: the user's messages and the results of tools are given."""
    first = drawn.messages[0]
    system = first["content"] if first["role"] == "system" else None
    chat = Chat(
        TextGenerator(layout.tokenizer, engine), layout, AnswerConfig(max_new_tokens=512), system, drawn.tools
    )
    for message in drawn.messages:
        if message["role"] == "user":
            list(chat.say(message["content"]))
        elif message["role"] == "tool" and chat.add_result(message["content"]):
            list(chat.say(None))
    return chat


KINDS = {
    "qwen3": ("tool results", "mixed"),
    "qwen3_5_nothink": ("tool results", "plain"),
    "glm4moe": ("tool results", "multi-turn thinking"),
    "gptoss": ("tool results", "multi-turn thinking"),
    "qwen3_8": ("multi-turn thinking",),
    "nemotron_3_nano": ("multi-turn thinking",),
    "qwen2_5": ("tool results", "plain"),
    "llama3_2": ("tool results", "plain"),
    "glm4": ("plain", "system"),
}
"""Templates, and conversations that each takes; GLM-4's has no piece that ends a turn."""
DAY = "2026-02-03"


def day_of(name: str) -> list[str]:
    """What tells the day to a template that asks for it."""
    return ["--chat-template-date", DAY] if name in ("gptoss", "llama3_2") else []


def samples_of(dataset: Dataset) -> list[tuple[list[int], list[int]]]:
    arrays = [dataset.arrays[name] for name in ("input_ids", "labels")]
    return [(arrays[0][row].tolist(), arrays[1][row].tolist()) for row in range(len(arrays[1]))]


def hold_all(drawn: list[Drawn], layout_of: Callable[[bool], PromptLayout], engine: Learned) -> None:
    """Hold conversations; all answers are found, and become the messages that they were."""
    for one in drawn:
        chat = held(one, engine, layout_of(bool(one.tools)))
        wanted = [message for message in one.messages if message["role"] != "system"]
        assert [message["role"] for message in chat.messages] == [message["role"] for message in wanted]
        for message, other in zip(chat.messages, wanted, strict=True):
            calls, others = (
                [call["function"] for call in each.get("tool_calls", ())] for each in (message, other)
            )
            assert calls == others
            assert message.get("reasoning_content") == other.get("reasoning_content")
    assert not engine.unused


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", KINDS)
def test_a_chat_finds_the_answers_of_samples_in_the_forms_of_families(
    name: str, theirs: Any, tmp_path: Path
) -> None:
    """Thoughts, calls and results between the marks of each family: read from answers, and fed again."""
    theirs.chat_template = templates()[name][0]
    theirs.save_pretrained(tmp_path)
    draw = Draw(f"forms {name}")
    drawn = [draw.conversation(KINDS[name][number % len(KINDS[name])]) for number in range(6)]
    done = call(
        "asd-data", "preprocess", "--input", json_lines(tmp_path / "x.jsonl", [one.record for one in drawn]),
        "--output-prefix", tmp_path / "set", "--tokenizer-name-or-path", tmp_path, "--handler-name",
        "MessagesHandler", *day_of(name),
    )  # fmt: skip
    assert done.status == 0, done.stderr
    dataset, tokenizer = open_dataset(tmp_path / "set"), load_tokenizer(tmp_path)
    tokenizer.template_values = TemplateValues.of_flags(None, DAY)
    assert dataset.manifest is not None
    layout = recorded_layout(dataset.manifest, tokenizer)
    assert layout is not None
    engine = Learned(samples_of(dataset), len(theirs))
    answers = len(engine.unused)
    hold_all(drawn, lambda _: layout, engine)
    assert answers > 6


@pytest.mark.parametrize(
    ("name", "kind", "values", "count"),
    [
        ("qwen3_5_think", "plain", None, 4),
        ("qwen3_5_think", "plain", '{"enable_thinking": false}', 0),
        ("qwen3_5_think", "reasoning", None, 0),
        ("qwen3", "plain", None, 0),
        ("nemotron_3_nano", "plain", None, 4),
        ("deepseek_r1_distill", "plain", None, 4),
    ],
)
def test_answers_that_a_chat_asks_for_otherwise_are_counted(
    name: str, kind: str, values: str | None, count: int, theirs: Any, tmp_path: Path
) -> None:
    """Where none is counted, each prompt of a chat begins a sample; where all are, the prompt of the first does not."""
    theirs.chat_template = templates()[name][0]
    theirs.save_pretrained(tmp_path)
    draw = Draw(f"otherwise {name}")
    drawn = [draw.conversation(kind) for _ in range(4)]
    flags = () if values is None else ("--chat-template-kwargs", values)
    done = call(
        "asd-data", "preprocess", "--input", json_lines(tmp_path / "x.jsonl", [one.record for one in drawn]),
        "--output-prefix", tmp_path / "set", "--tokenizer-name-or-path", tmp_path, "--handler-name",
        "MessagesHandler", *flags,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert (f"{count:,} records have answers without thoughts" in done.stderr) == bool(count)
    dataset = open_dataset(tmp_path / "set")
    assert dataset.manifest is not None
    assert dataset.manifest.num_other_prompts == count
    layout = recorded_layout(dataset.manifest, load_tokenizer(tmp_path))
    assert layout is not None
    samples = [ids for ids, _ in samples_of(dataset)]
    prompts = [layout.ids(one.messages[:1]) for one in drawn]
    found = [any(ids[: len(prompt)] == prompt for ids in samples) for prompt in prompts]
    assert found == [not count] * 4


def test_a_chat_feeds_the_ids_of_the_samples_at_each_turn(theirs: Any, tmp_path: Path) -> None:
    """`asd-core finetune --data` on conversations with tools, results and thoughts; a chat finds each answer."""
    folder, run = tmp_path / "model", tmp_path / "run"
    theirs.chat_template = templates()["qwen3"][0]
    theirs.save_pretrained(folder)
    save_hugging_face(tiny_config(vocab_size=len(theirs), max_position_embeddings=1024), folder, 1)
    draw = Draw("one command")
    drawn = [draw.conversation(("tool results", "mixed")[number % 2]) for number in range(16)]
    done = call(
        "asd-core", "finetune", "--load", folder, "--data",
        json_lines(tmp_path / "messages.jsonl", [one.record for one in drawn]), "--save", run, "--seq-length", 1024,
        "--global-batch-size", 2, "--train-iters", 1, "--lr", 1e-4, "--split", "100,0,0", "--device", "cpu",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    (prefix,) = (tmp_path / "run-data").glob("*.manifest.json")
    engine = Learned(samples_of(open_dataset(Path(str(prefix).removesuffix(".manifest.json")))), len(theirs))
    answers = len(engine.unused)
    source, tokenizer = open_source(ModelSourceConfig(load=run), seed=0), load_tokenizer(run / "tokenizer")
    hold_all(drawn, lambda tools: choose_layout(source, tokenizer, None, lambda _: None, tools), engine)
    assert answers > 24
