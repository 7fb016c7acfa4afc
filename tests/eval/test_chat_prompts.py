"""Benchmarks in conversations: prompts, scores and answers against lm-evaluation-harness's own code."""

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval==0.4.13")

from ascendspeed_eval.conversations import ChatSettings, conversations
from ascendspeed_eval.evaluation import Evaluation, prepare_evaluation
from ascendspeed_eval.model import GenerateResult
from ascendspeed_eval.tasks.answer_marks import marks_of
from ascendspeed_eval.tasks.chat_answers import opens_reasoning, split_answer
from ascendspeed_eval.tasks.registry import find_task, find_variant
from ascendspeed_infer.transformers_backend import TransformersBackend
from support.chat_templates import make_tokenizer, templates
from support.commands import run_command
from support.lm_eval_tasks import harness_task
from support.models import save_hugging_face, tiny_config
from support.shared_data import BENCHMARK_FOLDERS, needs_shared_data
from support.tables import ReportTables

TEMPLATES = ("qwen3", "llama3", "gemma", "yi")
"""gemma's refuses a system message, which MMLU's header becomes."""
SUBSETS = {"mmlu": ("sociology",), "gsm8k": (), "boolq": ()}
"""Of the subjects of MMLU one with 100 records."""
SHOTS = {"mmlu": 5, "gsm8k": 5, "boolq": 0}
SYSTEM = "You are a careful student."


class Models:
    """A tiny model of random weights with a chat template, here and in transformers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = make_tokenizer(folder)
        config = tiny_config(vocab_size=len(self.tokenizer), max_position_embeddings=8192, num_layers=2)
        self.model = save_hugging_face(config, folder, 1)

    def use(self, template: str) -> None:
        """Give the folder and its tokenizer a template."""
        self.tokenizer.chat_template = templates()[template][0]
        self.tokenizer.save_pretrained(self.folder)

    def render(self, values: dict[str, Any]) -> Any:
        """The harness's function that renders a chat history."""
        from lm_eval.models.huggingface import HFLM

        holder = SimpleNamespace(tokenizer=self.tokenizer, chat_template_args=values)
        return partial(HFLM.apply_chat_template, holder)

    def harness(self) -> Any:
        """Its `hf` model."""
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=4, max_length=8192)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("chat-model"))


def ours(name: str, limit: int, seed: int | None, chat: ChatSettings) -> Evaluation:
    task = find_task(name)
    return prepare_evaluation(
        task, find_variant(task, "lm-eval"), str(BENCHMARK_FOLDERS[name]),
        subsets=SUBSETS[name], limit=limit, limit_seed=seed, num_fewshot=SHOTS[name], chat=chat,
    )  # fmt: skip


def theirs(evaluation: Evaluation, models: Models, values: dict[str, Any]) -> Iterator[list[Any]]:
    """The harness's requests of each sample."""
    chat, name = evaluation.chat, evaluation.task.name
    assert chat is not None
    subset = evaluation.samples[0].record.subset
    task = harness_task(name, subset, evaluation.benchmark, SHOTS[name])
    task.build_all_requests(
        rank=0, world_size=1, system_instruction=chat.system, apply_chat_template=True,
        fewshot_as_multiturn=chat.fewshot_as_multiturn, chat_template=models.render(values),
    )  # fmt: skip
    for number in range(len(evaluation.samples)):
        yield [request for request in task.instances if request.doc_id == number]


def compare_prompts(
    models: Models, name: str, template: str, limit: int, seed: int | None, **chosen: Any
) -> int:
    models.use(template)
    settings = ChatSettings(**chosen)
    evaluation = ours(name, limit, seed, settings)
    values = dict(settings.template_values)
    with TransformersBackend().open({"transformers_model": str(models.folder)}) as model:
        made = conversations(settings, evaluation.samples, model)
    for sample, requests in zip(made, theirs(evaluation, models, values), strict=True):
        asked = evaluation.task.requests(sample, evaluation.variant, evaluation.generation)
        for one, request in zip(asked, requests, strict=True):
            if request.request_type == "loglikelihood":
                assert (one.context, one.continuation) == request.args  # type: ignore[union-attr]
            else:
                assert one.prompt == request.args[0]  # type: ignore[union-attr]
                assert tuple(request.args[1]["until"]) == evaluation.variant.stop
    return len(made)


FORMS: dict[str, dict[str, Any]] = {
    "turns": {},
    "one message": {"fewshot_as_multiturn": False},
    "system": {"system": SYSTEM},
    "values": {"template_values": {"enable_thinking": False}},
}


@needs_shared_data
@pytest.mark.parametrize("name", SHOTS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_equal_the_harness(models: Models, name: str, template: str) -> None:
    for form, chosen in FORMS.items():
        if form == "values" and template != "qwen3":
            continue
        assert compare_prompts(models, name, template, 2, None, **chosen) == 2


@needs_shared_data
@pytest.mark.nightly
@pytest.mark.parametrize("name", SHOTS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_of_drawn_records_equal_the_harness(
    models: Models, name: str, template: str, report: ReportTables
) -> None:
    """100 of each: all of one subject of MMLU, of the others they are drawn."""
    counts = [
        compare_prompts(models, name, template, 100, 7, **chosen)
        for form, chosen in FORMS.items()
        if form != "values" or template == "qwen3"
    ]
    assert set(counts) == {100}
    head = "Prompts of conversations equal to lm-evaluation-harness's"
    report.add(head, ("task", "template", "forms", "prompts"), name, template, len(counts), sum(counts))


def run(models: Models, name: str, output: Path, limit: int, *flags: object) -> list[dict[str, Any]]:
    subsets = [word for subset in SUBSETS[name] for word in ("--subset", subset)]
    done = run_command(
        "asd-eval", "run", "--task", name, "--task-data-path", BENCHMARK_FOLDERS[name], "--protocol", "lm-eval",
        "--output-dir", output, "--limit", limit, "--apply-chat-template", *subsets, *flags,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    return [json.loads(line) for line in (output / "samples.jsonl").read_text("utf-8").split("\n") if line]


def compare_scores(models: Models, name: str, output: Path, limit: int) -> tuple[int, float, int]:
    """Return the number of samples, the largest difference of a log-likelihood, and how many have the same answer."""
    models.use("qwen3")
    lines = run(models, name, output, limit, "--load", models.folder, "--device", "cpu", "--system", SYSTEM)
    evaluation = ours(name, limit, None, ChatSettings(SYSTEM))
    grouped = list(theirs(evaluation, models, {}))
    model, largest, same = models.harness(), 0.0, 0
    values = iter(model.loglikelihood([one for group in grouped for one in group]))
    for line, group in zip(lines, grouped, strict=True):
        assert (line["prompt"], line["choices"][0]) == group[0].args
        found = [next(values)[0] for _ in group]
        largest = max(largest, *(abs(a - b) for a, b in zip(line["logprobs"], found, strict=True)))
        is_same = line["answer"] == found.index(max(found))
        assert is_same or sorted(found)[-1] - sorted(found)[-2] <= 2e-4
        same += is_same
    return len(lines), largest, same


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("mmlu", 2),
        ("boolq", 4),
        pytest.param("mmlu", 100, marks=pytest.mark.nightly),
        pytest.param("boolq", 100, marks=pytest.mark.nightly),
    ],
)
def test_scores_equal_the_harness(
    models: Models, name: str, limit: int, tmp_path: Path, report: ReportTables
) -> None:
    count, largest, same = compare_scores(models, name, tmp_path / "out", limit)
    # fp32 sums in another order, in batches of other sizes, at thousands of positions.
    assert (count, largest <= 2**-12) == (limit, True)
    head = "Log-likelihoods in conversations against lm-evaluation-harness"
    report.add(head, ("task", "samples", "largest difference", "same answers"), name, count, largest, same)


@needs_shared_data
@pytest.mark.nightly
def test_replicas_share_conversations(models: Models, tmp_path: Path) -> None:
    models.use("qwen3")
    flags = ("--load", models.folder, "--device", "cpu")
    alone = run(models, "boolq", tmp_path / "alone", 6, *flags)
    assert run(models, "boolq", tmp_path / "two", 6, *flags, "--nproc-per-node", 2) == alone
    texts = ("--max-new-tokens", 6, "--num-fewshot", 0)
    alone = run(models, "gsm8k", tmp_path / "texts", 4, *flags, *texts)
    assert run(models, "gsm8k", tmp_path / "texts-two", 4, *flags, *texts, "--nproc-per-node", 2) == alone


def compare_texts(models: Models, output: Path, limit: int) -> int:
    """Greedy texts of both up to the first stop string; the harness's model knows no end of a turn."""
    models.use("qwen3")
    flags = ("--max-new-tokens", 12, "--num-fewshot", 1)
    lines = run(models, "gsm8k", output, limit, "--load", models.folder, "--device", "cpu", *flags)
    evaluation = ours("gsm8k", limit, None, ChatSettings())
    task = harness_task("gsm8k", "gsm8k", evaluation.benchmark, 1)
    task.build_all_requests(
        rank=0, world_size=1, apply_chat_template=True, fewshot_as_multiturn=True,
        chat_template=models.render({}),
    )  # fmt: skip
    for request in task.instances:
        request.args[1]["max_gen_toks"] = 12
    texts = models.harness().generate_until(task.instances)
    compared = 0
    for line, request, text in zip(lines, task.instances, texts, strict=True):
        assert line["prompt"] == request.args[0]
        if line["finish_reasons"] == ["length"]:
            assert line["outputs"] == [text]
            compared += 1
    return compared


@needs_shared_data
@pytest.mark.parametrize("limit", [3, pytest.param(100, marks=pytest.mark.nightly)])
def test_generated_texts_equal_the_harness(models: Models, limit: int, tmp_path: Path) -> None:
    assert compare_texts(models, tmp_path / "out", limit) >= limit * 2 // 3


def test_reasoning_is_removed_as_the_harness_removes_it() -> None:
    from lm_eval.models.utils import postprocess_generated_text

    draw, unclosed, cut = random.Random(3), 0, 0
    parts = ("So", " 4", "\n", "Question:", " ", "#### 4", "<think>", "</think>", "\n\n", "x")
    stop = ("Question:", "\n\n")
    for _ in range(4000):
        is_open = draw.random() < 0.3
        text = "".join(draw.choices(parts, k=draw.randint(0, 9)))
        text = draw.choice(("", "<think>", "\n<think>\n")) + text
        answer, removed = split_answer(GenerateResult(text, "length"), stop, is_open)
        marks = marks_of([GenerateResult(text, "length")], is_open)
        if "</think>" not in text and (is_open or text.lstrip().startswith("<think>")):
            assert (answer.text, removed) == ("", text)
            assert "unclosed reasoning" in marks
            unclosed += 1
            continue
        # Without the mark there is nothing to remove, and the harness takes off white space all the same.
        mark = "</think>" if "</think>" in text else None
        assert answer.text == postprocess_generated_text(text, list(stop), mark)
        assert (removed + answer.text) == text[: len(removed) + len(answer.text)]
        assert answer.finish_reason == ("stop" if removed + answer.text != text else "length")
        cut += answer.finish_reason == "stop"
    assert unclosed > 500
    assert cut > 500


def test_prompts_that_open_reasoning_are_known() -> None:
    assert opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_reasoning("What does <think> mean?\n<|im_start|>assistant\n")
