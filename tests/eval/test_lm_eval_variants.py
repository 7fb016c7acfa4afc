"""The protocols `lm-eval` ask and score as lm-evaluation-harness does: its own code runs on the same records."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval==0.4.13")

from ascendspeed_data.tokenizer import copy_tokenizer
from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.evaluation import Evaluation, prepare_evaluation
from ascendspeed_eval.tasks.registry import find_task, find_variant
from ascendspeed_eval.tasks.samples import Record
from support.commands import run_command
from support.lm_eval_tasks import harness_model, harness_requests, harness_task
from support.models import save_hugging_face, tiny_config
from support.shared_data import BENCHMARK_FOLDERS, STORIES, TOKENIZERS, needs_shared_data
from support.tables import ReportTables

pytestmark = needs_shared_data

SHOTS = {"mmlu": 5, "ceval": 5, "gsm8k": 5, "boolq": 0, "agieval": 0, "bbh": 3, "bbh-direct": 3}
VARIANTS = {"bbh-direct": "lm-eval-direct"}


def ours(name: str, subsets: Sequence[str] = (), limit: int | None = None) -> Evaluation:
    task = find_task(name.removesuffix("-direct"))
    variant = find_variant(task, VARIANTS.get(name, "lm-eval"))
    return prepare_evaluation(task, variant, str(BENCHMARK_FOLDERS[task.name]), subsets=subsets, limit=limit)


def subsets_of(evaluation: Evaluation) -> list[str]:
    return list(dict.fromkeys(sample.record.subset for sample in evaluation.samples))


@pytest.mark.parametrize("name", SHOTS)
def test_prompts_and_continuations_equal_the_harness(name: str, report: ReportTables) -> None:
    """Every subset's first two prompts, and what is scored or ends the text, character by character."""
    evaluation = ours(name, limit=2)
    compared = 0
    for subset in subsets_of(evaluation):
        own = [sample for sample in evaluation.samples if sample.record.subset == subset]
        requests = harness_requests(harness_task(name, subset, evaluation.benchmark, SHOTS[name]))
        choices = evaluation.variant.choices
        for number, sample in enumerate(own):
            theirs = [request for request in requests if request.doc_id == number]
            if theirs[0].request_type == "loglikelihood":
                assert choices is not None
                assert [request.args for request in theirs] == [
                    (sample.prompt, c) for c in choices(sample.record)
                ]
            else:
                prompt, settings = theirs[0].args
                assert prompt == sample.prompt
                assert tuple(settings["until"]) == _stops(evaluation, name)
                wanted = settings.get("max_gen_toks", 256)
                assert wanted == (32 if name == "agieval" else evaluation.variant.max_new_tokens)
            compared += 1
    report.add(
        "Prompts equal to lm-evaluation-harness's",
        ("task", "subsets", "prompts"),
        name,
        len(subsets_of(evaluation)),
        compared,
    )


def _stops(evaluation: Evaluation, name: str) -> tuple[str, ...]:
    return evaluation.variant.stop


def test_drawn_examples_of_boolq_equal_the_harness(tmp_path: Path) -> None:
    """The development file, cut into questions and a pool: the harness draws the examples of each question."""
    lines = (BENCHMARK_FOLDERS["boolq"] / "dev.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "dev.jsonl").write_text("".join(lines[:20]), encoding="utf-8")
    (tmp_path / "train.jsonl").write_text("".join(lines[20:120]), encoding="utf-8")
    task = find_task("boolq")
    evaluation = prepare_evaluation(task, find_variant(task, "lm-eval"), str(tmp_path), num_fewshot=5)
    requests = harness_requests(harness_task("boolq", "boolq", evaluation.benchmark, 5))
    theirs = {request.doc_id: request.args[0] for request in requests}
    assert [sample.prompt for sample in evaluation.samples] == [theirs[n] for n in range(20)]


def test_boolq_of_super_glue_gives_the_same_prompts(tmp_path: Path) -> None:
    """Its passages begin with the title; both protocols ask what they ask of BoolQ's own file."""
    lines = (BENCHMARK_FOLDERS["boolq"] / "dev.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    theirs = [
        {
            "question": r["question"],
            "passage": f"{r['title']} -- {r['passage']}",
            "idx": n,
            "label": r["answer"],
        }
        for n, r in enumerate(rows)
    ]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(one) + "\n" for one in theirs), encoding="utf-8")
    task = find_task("boolq")
    for variant in task.variants.values():
        found = prepare_evaluation(task, variant, str(tmp_path)).samples
        wanted = prepare_evaluation(task, variant, str(BENCHMARK_FOLDERS["boolq"])).samples
        assert [(s.prompt, s.record.target) for s in found] == [(s.prompt, s.record.target) for s in wanted]
    without = [{key: one for key, one in row.items() if key != "title"} for row in rows]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(one) + "\n" for one in without), encoding="utf-8")
    with pytest.raises(EvaluationError, match="dev-1 has no title"):
        prepare_evaluation(task, find_variant(task, "lm-eval"), str(tmp_path))


def test_ceval_is_read_as_the_harness_reads_it(report: ReportTables) -> None:
    """The script of its dataset reads with pandas, which takes some texts for numbers or for nothing."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas")
    compared = different = 0
    for file in sorted(BENCHMARK_FOLDERS["ceval"].glob("*/*_val.csv")):
        subject = file.name.removesuffix("_val.csv")
        own = ours("ceval", [subject]).benchmark.records
        compared += len(own)
        table = pandas.read_csv(file, encoding="utf-8").to_dict(orient="records")
        for record, row in zip(own, table, strict=True):
            different += any(str(row[key]) != record.fields[key] for key in ("question", *"ABCD", "answer"))
    report.add("C-Eval as pandas reads it", ("records", "different"), compared, different)
    assert different == 0


def test_human_eval_prompts_equal_the_harness() -> None:
    """Its YAML alone: its code fetches a metric from the Hugging Face hub when it is imported."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / "humaneval/humaneval.yaml", resolve_func=False)
    evaluation = ours("human_eval", limit=3)
    assert config["doc_to_text"] == "{{prompt}}"
    assert [s.prompt for s in evaluation.samples] == [s.record.fields["prompt"] for s in evaluation.samples]
    assert tuple(config["generation_kwargs"]["until"]) == evaluation.variant.stop
    assert config["generation_kwargs"]["max_gen_toks"] == evaluation.variant.max_new_tokens


def made_answers(record: Record, draw: random.Random) -> str:
    """A right, wrong or malformed answer."""
    right = str(record.target)
    number = draw.choice(["7", "1,234", "-3", "$5.50", "0.5", "12."])
    text = draw.choice(
        [*[right] * 9, number, "", "(B)", "Yes", "\\frac12", "x = " + right, "$" + right + "$"]
    )
    return draw.choice(
        [
            f" {text}",
            text,
            f"So the answer is {text}.",
            f"the answer is {text}.\nthe answer is (Z).",
            f"Thus 3 + 4 = 7.\n#### {text}",
            f"####{text}",
            f"#### {text}.",
            f"The answer is {text}",
            f"\\boxed{{{text}}}",
            f"\\boxed{{{text}",
            f"we get ${text}$",
            f"x = {text}.",
            f"{text} apples, or {number}",
            "中文 " + text,
            "\n",
        ]
    )


@pytest.mark.parametrize("name", ["gsm8k", "bbh", "bbh-direct", "agieval"])
def test_extracted_answers_and_scores_equal_the_harness(name: str, report: ReportTables) -> None:
    """200 outputs per task, through its filters and metrics and through ours."""
    subsets = ("math", "gaokao-mathcloze") if name == "agieval" else ()
    evaluation = ours(name, subsets, limit=200 if name == "gsm8k" else 100 if name == "agieval" else 8)
    draw, right, count = random.Random(7), 0, 0
    for subset in subsets_of(evaluation):
        task = harness_task(name, subset, evaluation.benchmark, SHOTS[name])
        requests = harness_requests(task)
        own = [sample for sample in evaluation.samples if sample.record.subset == subset]
        texts = [made_answers(sample.record, draw) for sample in own]
        for request in requests:
            request.resps = [texts[request.doc_id]]
        task.apply_filters()
        names = {
            "strict-match": "strict",
            "flexible-extract": "flexible",
            "get-answer": "strict",
            "none": "strict",
        }
        for request in requests:
            sample, text = own[request.doc_id], texts[request.doc_id]
            found = evaluation.variant.extract(text, sample.record)
            for filtered, answer in request.filtered_resps.items():
                metrics = task.process_results(request.doc, [answer])
                theirs = float(next(iter(metrics.values())))
                mine = found[names[filtered]]
                assert float(evaluation.variant.matches(mine, sample.record)) == theirs, (
                    text,
                    sample.record.target,
                )
                right += int(theirs)
                count += 1
    assert 0.03 < right / count < 0.9
    report.add(
        "Made outputs scored as lm-evaluation-harness scores them",
        ("task", "scores", "of them right"),
        name,
        count,
        right,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LLaMA and a Qwen 2 (biases, tied head) with LLaMA's tokenizer and 4,096 positions; stories260K."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models")
    common: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 4096}
    save_hugging_face(
        tiny_config(**common, num_layers=2, num_key_value_heads=8), folder / "llama", 1, TOKENIZERS / "llama"
    )
    torch.manual_seed(2)
    config = Qwen2Config(
        **common, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "qwen")
    copy_tokenizer(TOKENIZERS / "llama", folder / "qwen")
    return {"llama": folder / "llama", "qwen": folder / "qwen", "stories260K": STORIES}


PART = {
    "boolq": ((), 24),
    "mmlu": (("abstract_algebra", "high_school_us_history", "marketing"), 6),
    "agieval": (("aqua-rat", "jec-qa-ca", "sat-en", "gaokao-physics", "logiqa-zh"), 4),
    "ceval": (("accountant", "logic"), 6),
}


def compare_scores(
    name: str, folder: Path, output: Path, subsets: Sequence[str], limit: int
) -> tuple[int, float, int]:
    """Run both on the same samples; return how many, the largest difference, and how many were cut off."""
    flags = [word for subset in subsets for word in ("--subset", subset)]
    done = run_command(
        "asd-eval", "run", "--task", name, "--task-data-path", BENCHMARK_FOLDERS[name], "--protocol", "lm-eval",
        "--load", folder, "--device", "cpu", "--output-dir", output, "--limit", limit, *flags,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text("utf-8").split("\n") if line]
    evaluation, model = ours(name, subsets, limit), harness_model(folder)
    largest, scores = 0.0, []
    for subset in subsets_of(evaluation):
        task = harness_task(name, subset, evaluation.benchmark, SHOTS[name])
        requests = harness_requests(task)
        results = model.loglikelihood(requests)
        own = [line for line in lines if line["subset"] == subset]
        for number, line in enumerate(own):
            theirs = [(r, value) for r, value in zip(requests, results, strict=True) if r.doc_id == number]
            values = [value for _, (value, _) in theirs]
            largest = max(largest, *(abs(a - b) for a, b in zip(line["logprobs"], values, strict=True)))
            metrics = task.process_results(theirs[0][0].doc, [value for _, value in theirs])
            gap = sorted(values)[-1] - sorted(values)[-2]
            if gap > 2e-4:
                assert line["answer"] == values.index(max(values))
                assert line["scores"]["accuracy"] == metrics["acc"]
                if "acc_norm" in metrics:
                    assert line["scores"]["accuracy_normalised"] == metrics["acc_norm"]
            scores.append(metrics["acc"])
    results = json.loads((output / "results.json").read_text())["tasks"][name]
    assert results["score"] == pytest.approx(sum(scores) / len(scores), abs=1e-12)
    return len(lines), largest, results["truncated_samples"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("llama", name) for name in PART),
        pytest.param("qwen", "mmlu", marks=pytest.mark.nightly),
        ("stories260K", "mmlu"),
    ],
)
def test_log_likelihoods_equal_the_harness(
    name: str, model: str, models: dict[str, Path], tmp_path: Path, report: ReportTables
) -> None:
    count, largest, cut = compare_scores(name, models[model], tmp_path / "out", *PART[name])
    # fp32 sums in another order: batches of other sizes, the examples computed apart. Those above 1,024 have steps of
    # 2**-13; two of them are allowed.
    assert largest <= 2**-12
    report.add(HEAD, COLUMNS, name, model, count, largest, cut)


HEAD = "Log-likelihoods against lm-evaluation-harness"
COLUMNS = ("task", "model", "samples", "largest difference", "cut off")


@pytest.mark.nightly
@pytest.mark.parametrize("name", PART)
@pytest.mark.parametrize("model", ["llama", "qwen", "stories260K"])
def test_log_likelihoods_of_every_subset_equal_the_harness(
    name: str, model: str, models: dict[str, Path], tmp_path: Path, report: ReportTables
) -> None:
    limit = 100 if name == "boolq" else 3
    choice = [s for s in subsets_of(ours(name)) if s not in ("math", "gaokao-mathcloze")]
    count, largest, cut = compare_scores(name, models[model], tmp_path / "out", choice, limit)
    # As above; sums go up to 3,500 here, and above 2,048 a step is 2**-12.
    assert largest <= 2**-11
    report.add(HEAD, COLUMNS, name, model, count, largest, cut)
