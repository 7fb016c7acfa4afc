"""A chat: the template is the recorded one, answers are what `generate` gives, and no history is too long."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.weights import open_source
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.prompting import layout_named
from ascendspeed_infer.chat import Chat, choose_layout
from ascendspeed_infer.config import AnswerConfig
from ascendspeed_infer.conversing import ANSWER, USER, converse
from ascendspeed_infer.language_model import LanguageModel
from support.commands import call, run_command
from support.corpus import make_chat_tokenizer
from support.models import save_hugging_face, tiny_config

TURNS = ["the year", "it was a", "中文 and"]
SHORT: dict[str, Any] = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer that has a chat template."""
    path = tmp_path_factory.mktemp("model")
    make_chat_tokenizer(path / "tokenizer")
    config = tiny_config(vocab_size=600, max_position_embeddings=512)
    save_hugging_face(config, path / "hf", tokenizer=path / "tokenizer")
    return path / "hf"


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A run that trained all of the model, and one that trained an adapter."""
    made = tmp_path_factory.mktemp("runs")
    task = {"instruction": "the", "input": "", "output": "of"}
    talk = {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "of"}]}
    for name, handler, record, more in (
        ("whole", "GeneralInstructionHandler", task, []),
        ("lora", "MessagesHandler", talk, ["--lora-target-modules", "all-linear"]),
    ):
        (made / "x.jsonl").write_text(f"{json.dumps(record)}\n" * 4)
        data = made / f"{name}-data"
        commands: list[list[object]] = [
            ["asd-data", "preprocess", "--input", made / "x.jsonl", "--output-prefix", data, "--append-eod",
             "--handler-name", handler, "--tokenizer-name-or-path", folder],
            ["asd-core", "finetune", "--load", folder, "--is-instruction-dataset", "--data-path", data, "--split",
             "100,0,0", "--seq-length", 256, "--global-batch-size", 2, "--train-iters", 1, "--lr", 1e-9, "--device",
             "cpu", "--save", made / name, *more],
        ]  # fmt: skip
        for command in commands:
            done = call(*command)
            assert done.status == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def recorded(runs: Path) -> Path:
    return runs / "whole"


def answers(chat: Chat, *texts: str) -> list[str]:
    return ["".join(piece.text for piece in chat.say(text)) for text in texts]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 5, "top_k": 20}])
@pytest.mark.parametrize("template", ["tokenizer", "instruction", "hh-rlhf"])
def test_answers_are_those_of_generate(model: LanguageModel, template: str, options: dict[str, Any]) -> None:
    layout = layout_named(template, model.tokenizer)
    chat = Chat(model, layout, AnswerConfig(max_new_tokens=6, **options))
    found = answers(chat, *TURNS[:2])
    messages: list[dict[str, str]] = []
    for number, (text, answer) in enumerate(zip(TURNS, found, strict=False)):
        messages.append({"role": "user", "content": text})
        ends = (*model.eos_token_ids(), *layout.end_ids)
        (want,) = model.generate(
            layout.ids(messages),
            max_new_tokens=6,
            stop=layout.stop,
            eos_token_ids=ends,
            **{**options, "seed": 1234 + number if "seed" not in options else 5 + number},
        )
        assert want.text == answer
        messages.append({"role": "assistant", "content": answer.strip()})
    assert chat.messages == messages


def test_the_end_of_a_turn_ends_the_answer(model: LanguageModel) -> None:
    """Whatever the model says first is made the piece that ends a turn."""
    layout = layout_named("tokenizer", model.tokenizer)
    (free,) = model.generate(
        layout.ids([{"role": "user", "content": TURNS[0]}]), max_new_tokens=4, ignore_eos=True
    )
    ending = type(layout)(
        layout.name, layout.tokenizer, layout.sample, layout.append_eod, (free.token_ids[2],)
    )
    pieces = list(Chat(model, ending, AnswerConfig(**SHORT)).say(TURNS[0]))
    assert [piece.token_id for piece in pieces] == list(free.token_ids[:3])
    assert pieces[-1].finish_reason == "stop"
    going_on = Chat(model, ending, AnswerConfig(**SHORT, ignore_eos=True))
    assert len(list(going_on.say(TURNS[0]))) == 8


def test_what_the_model_is_told_first(model: LanguageModel) -> None:
    layout = layout_named("tokenizer", model.tokenizer)
    chat = Chat(model, layout, AnswerConfig(**SHORT), system="Be kind.")
    (answer,) = answers(chat, "the")
    ids = layout.ids([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "the"}])
    assert (
        model.generate(ids, **SHORT, eos_token_ids=(*model.eos_token_ids(), *layout.end_ids))[0].text
        == answer
    )
    with pytest.raises(AscendSpeedError, match="no place for a system message"):
        Chat(model, layout_named("instruction", model.tokenizer), AnswerConfig(), system="Be kind.")


def test_a_history_that_outgrows_the_model(model: LanguageModel) -> None:
    layout = layout_named("tokenizer", model.tokenizer)
    chat = Chat(model, layout, AnswerConfig(max_new_tokens=8, ignore_eos=True))
    for number in range(8):
        (answer,) = answers(chat, f"the year {number} it was" * 8)
        assert chat.messages[-2:] == [
            {"role": "user", "content": f"the year {number} it was" * 8},
            {"role": "assistant", "content": answer.strip()},
        ]
        # Nothing is lost without being counted, and no more is left out than must be.
        assert len(chat.messages) // 2 + chat.left_out_turns == number + 1
    assert chat.left_out_turns > 0
    chat.clear()
    assert (chat.messages, chat.left_out_turns) == ([], 0)
    with pytest.raises(AscendSpeedError, match=r"the message has \d+ tokens .* max_position_embeddings=512"):
        answers(chat, "the year " * 400)
    assert chat.messages == []


def test_the_history_is_not_read_again(model: LanguageModel) -> None:
    chat = Chat(
        model, layout_named("tokenizer", model.tokenizer), AnswerConfig(max_new_tokens=8, ignore_eos=True)
    )
    read: list[int] = []
    hook = model.model.register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].tokens.shape[1])
    )
    firsts = []
    for number in range(8):
        read.clear()
        answers(chat, f"the year {number}")
        assert read[1:] == [1] * 7
        firsts.append(read[0])
    hook.remove()
    # The last answer and the new question; while the cache of the engine still grows, which is twice at most, all is
    # read once more.
    assert sum(count > 40 for count in firsts) <= 2
    asked, answer = chat.messages[-2:]
    (want,) = model.generate(chat.layout.ids([*chat.messages[:-2], asked]), max_new_tokens=8, ignore_eos=True)
    assert want.text.strip() == answer["content"]


def test_an_answer_is_never_longer_than_the_model_can_read(model: LanguageModel) -> None:
    chat = Chat(model, layout_named("plain", model.tokenizer), AnswerConfig(ignore_eos=True))
    asked = len(model.tokenizer.encode("the year"))
    assert len(list(chat.say("the year"))) == 512 - asked


def spoken(chat: Chat, lines: list[str | None]) -> str:
    shown: list[str] = []
    rest: Iterator[str | None] = iter(lines)
    converse(chat, lambda prompt: shown.append(prompt) or next(rest), shown.append)  # type: ignore[func-returns-value]
    assert next(rest, "nothing") == "nothing"
    return "".join(shown)


def test_what_a_user_sees(model: LanguageModel) -> None:
    layout = layout_named("tokenizer", model.tokenizer)
    settings = AnswerConfig(max_new_tokens=5, ignore_eos=True)
    chat = Chat(model, layout, settings)
    first, second = answers(chat, "the", "it")
    for end in (*("q", "quit", "exit", " EXIT "), None):
        shown = spoken(Chat(model, layout, settings), ["the", "", "it", end])
        assert f"{USER}{ANSWER}{first}\n[The answer reached its limit" in shown
        assert f"{USER}{USER}{ANSWER}{second}\n" in shown
    assert "Ctrl-C: stop an answer. Any other line is a message." in spoken(chat, ["/help", "q"])
    for clear in ("clear", "new"):
        shown = spoken(Chat(model, layout, settings), ["the", clear, "the", "q"])
        assert shown.count(f"{ANSWER}{first}\n") == 2
        assert "A new conversation." in shown
    shown = spoken(Chat(model, layout, settings), ["the year " * 400, "the", None])
    assert "max_position_embeddings=512" in shown
    assert f"{ANSWER}{first}\n" in shown
    shown = spoken(Chat(model, layout, settings), [f"the year {n} it was" * 8 for n in range(8)] + ["q"])
    assert "turns are left out.]" in shown


def test_an_interrupted_answer_is_kept_as_far_as_it_got(model: LanguageModel) -> None:
    chat = Chat(
        model, layout_named("tokenizer", model.tokenizer), AnswerConfig(max_new_tokens=8, ignore_eos=True)
    )
    shown: list[str] = []

    def write(text: str) -> None:
        shown.append(text)
        if len(shown) == 5:
            raise KeyboardInterrupt

    rest = iter(["the", "q"])
    converse(chat, lambda prompt: next(rest), write)
    assert "[Interrupted.]" in "".join(shown)
    said = "".join(shown[2:5])
    assert chat.messages[1] == {"role": "assistant", "content": said.strip()}


def layout_of(path: Path, asked: str | None, model: LanguageModel) -> tuple[str, list[str]]:
    said: list[str] = []
    source = open_source(ModelSourceConfig(load=path), seed=0)
    return choose_layout(source, model.tokenizer, asked, said.append).name, said


def test_which_template(folder: Path, recorded: Path, model: LanguageModel, tmp_path: Path) -> None:
    name, said = layout_of(folder, None, model)
    assert name == "the tokenizer's chat template"
    assert said == ["template: the tokenizer's own (none is recorded with the checkpoint)"]
    name, said = layout_of(recorded, None, model)
    assert name == "GeneralInstructionHandler"
    assert said == ["template: GeneralInstructionHandler (recorded with the checkpoint)"]
    name, said = layout_of(recorded, "tokenizer", model)
    assert name == "the tokenizer's chat template"
    assert said[0].startswith(
        "warning: the model was trained with the template of GeneralInstructionHandler, and is used with the"
    )
    # The same template under another name is no reason to warn.
    assert layout_of(recorded, "instruction", model) == ("the instruction template", [])
    assert layout_of(folder, "instruction", model)[1] == []
    with pytest.raises(ConfigError, match="did you mean tokenizer"):
        layout_of(folder, "tokeniser", model)


def test_without_any_template(folder: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    save_hugging_face(tiny_config(vocab_size=400), tmp_path, tokenizer=tokenizer_folder)
    bare = LanguageModel.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(
        ConfigError, match=r"says how a conversation is laid out; give --chat-template, one of"
    ):
        layout_of(tmp_path, None, bare)


def test_the_template_of_an_adapter_comes_first(runs: Path, model: LanguageModel) -> None:
    """The run's, as it was trained: of the whole run, or of its checkpoint."""
    for adapter in (runs / "lora", runs / "lora" / "iter_0000001"):
        done = call(
            "asd-infer", "chat", "--load", runs / "whole", "--lora-load", adapter, "--device", "cpu",
            "--max-new-tokens", 6, stdin="the\nq\n",
        )  # fmt: skip
        assert done.status == 0, done.stderr
        assert "template: the chat template of the training data (recorded" in done.stderr
        chat = Chat(model, layout_named("tokenizer", model.tokenizer), AnswerConfig(max_new_tokens=6))
        # A step of 1e-9 leaves the ids as they were.
        assert f"{ANSWER}{answers(chat, 'the')[0]}\n" in done.stdout


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_on_the_command_line(recorded: Path, model: LanguageModel, tp: int, pp: int) -> None:
    run = call if tp * pp == 1 else run_command
    done = run(
        "asd-infer", "chat", "--load", recorded, "--device", "cpu", "--max-new-tokens", 6, "--temperature", 0.5,
        "--nproc-per-node", tp * pp, "--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp,
        stdin="the year\nit was\n",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    chat = Chat(model, layout_named("instruction", model.tokenizer), AnswerConfig(max_new_tokens=6))
    for answer in answers(chat, "the year", "it was"):
        assert f"{USER}{ANSWER}{answer}\n" in done.stdout
    assert done.stderr.count("temperature has no effect without do_sample") == 1
    assert done.stderr.count("template: GeneralInstructionHandler") == 1


BAD: dict[str, tuple[list[object], int, str]] = {
    "beams": (["--num-beams", 2], 2, "--num-beams: asd-infer generate has --num-beams"),
    "no such template": (["--chat-template", "chatlm"], 2, "chat_template=chatlm is neither a file nor one of"),
    "no place for a system message": (["--chat-template", "plain", "--system", "x"], 1, "leave --system out"),
    "no model": (["--load", "/nowhere"], 1, "checkpoint /nowhere does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(folder: Path, case: str) -> None:
    flags, status, complaint = BAD[case]
    done = call("asd-infer", "chat", "--load", folder, "--device", "cpu", *flags, stdin="x\n")
    assert done.status == status, done.stderr
    assert complaint in done.complaint
    assert done.stdout == ""
