"""Other engines behind the same commands: the ids of the own one, or a line that says what they cannot do."""

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.config.load import load_config
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.tokenizer import load_tokenizer
from ascendspeed_infer.config import GenerateConfig, SamplingConfig
from ascendspeed_infer.conversing import ANSWER
from ascendspeed_infer.engine.sequence import GenerationSettings
from ascendspeed_infer.engines import COMMON_OPTIONS, NATIVE, TextEngine, find_engine
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.sampling import SamplingParams
from ascendspeed_infer.text_generator import TextGenerator
from ascendspeed_infer.transformers_engine import TransformersEngine, load_transformers
from ascendspeed_infer.vllm_engine import (
    VllmEngine,
    log_probs_of,
    lora_rank,
    model_arguments,
    sampling_arguments,
)
from ascendspeed_infer.vllm_start import cause
from infer.test_loading_adapters import make_adapter
from support.commands import call, run_command
from support.models import save_hugging_face, tiny_config
from support.shared_data import STORIES, needs_shared_data

LINES = '{"prompt": "the year", "seed": 3, "name": "a"}\n{"prompt_token_ids": [1, 30, 31]}\n"中文 and"\n'
RULES: dict[str, list[object]] = {
    "greedy": ["--return-log-probs"],
    "stop texts and end ids": ["--stop", "e", "--stop", " t", "--eos-token-ids", 9],
    "no end": ["--ignore-eos", "--repetition-penalty", 1.3, "--echo"],
    "draws": [
        "--do-sample",
        "--temperature",
        0.7,
        "--top-k",
        30,
        "--top-p",
        0.9,
        "--num-return-sequences",
        2,
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_hugging_face(tiny_config(vocab_size=400), path, tokenizer=tokenizer_folder)
    make_adapter(path, path / "adapter", target_modules="all-linear", modules_to_save=["norm"])
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> TextGenerator:
    return TextGenerator(
        load_tokenizer(folder), TransformersEngine(load_transformers(str(folder), "auto", "cpu"))
    )


def completions(folder: Path, *flags: object) -> list[dict[str, Any]]:
    command = ("asd-infer", "generate", "--load", folder, "--device", "cpu", "--json", "--max-new-tokens", 12)
    done = call(*command, "--prompt-format", "jsonl", *flags, stdin=LINES)
    assert done.status == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", RULES)
def test_transformers_gives_the_completions_of_the_own_engine(folder: Path, case: str) -> None:
    want = completions(folder, *RULES[case])
    found = completions(folder, *RULES[case], "--engine", "transformers")
    for one, other in zip(found, want, strict=True):
        # fp32 sums of other kernels, over some ten tokens.
        assert one.pop("log_probs", []) == pytest.approx(other.pop("log_probs", []), abs=1e-4)
        assert one == other


def test_an_adapter_beside_the_weights(folder: Path) -> None:
    flags = ("--lora-load", folder / "adapter")
    assert completions(folder, *flags, "--engine", "transformers") == completions(folder, *flags)
    assert completions(folder, *flags) != completions(folder)


@needs_shared_data
def test_recorded_greedy_ids_of_trained_weights() -> None:
    cases = json.loads((STORIES / "expected.json").read_text(encoding="utf-8"))["cases"]
    engine = TransformersEngine(load_transformers(str(STORIES), "float32", "cpu"))
    model = TextGenerator(load_tokenizer(STORIES), engine)
    for case in cases:
        new = len(case["greedy_ids"]) - len(case["prompt_ids"])
        (found,) = model.generate([case["prompt_ids"]], max_new_tokens=new, ignore_eos=True)
        assert [*case["prompt_ids"], *found.token_ids] == case["greedy_ids"]


def test_a_chat_with_another_engine(folder: Path) -> None:
    said = [
        call(
            "asd-infer", "chat", "--load", folder, "--device", "cpu", "--max-new-tokens", 8, "--chat-template",
            "plain", "--engine", engine, stdin="the year\nit was\n",
        )
        for engine in (NATIVE, "transformers")
    ]  # fmt: skip
    assert said[1].status == 0, said[1].stderr
    assert said[0].stdout == said[1].stdout
    assert said[1].stdout.count(ANSWER) == 2
    assert "engine transformers" in said[1].stderr


def test_a_stream_is_the_whole_text_and_may_be_left(theirs: TextGenerator) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
    (whole,) = theirs.generate("the year", **options)
    pieces = list(theirs.generate("the year", stream=True, **options))
    assert [piece.token_id for piece in pieces] == list(whole.token_ids)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces] == [None] * 11 + ["length"]
    threads = threading.active_count()
    left = theirs.stream("the year", **options)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads
    with pytest.raises(ConfigError, match="log-probabilities at the end only"):
        list(theirs.generate("the", stream=True, max_new_tokens=4, return_log_probs=True))


REFUSED: dict[str, tuple[list[object], int, str]] = {
    "beams": (["--num-beams", 2], 2, "engine=transformers does not support num_beams=2"),
    "batches": (["--batch-size", 2], 2, "does not support batch_size=2"),
    "invariance": (["--batch-invariant"], 2, "does not support batch_invariant=True"),
    "a layout": (["--tensor-model-parallel-size", 2], 2, "tensor_model_parallel_size=2 is no option of engine=tr"),
    "ZeRO": (["--zero-stage", 3], 2, "zero_stage=3 is no option of engine=transformers"),
    "int8": (["--weight-quantization", "int8"], 2, "weight_quantization=int8 is no option of engine=transformers"),
    "processes": (["--nproc-per-node", 2], 2, "nproc_per_node=2 is no option of engine=transformers"),
    "an unknown engine": (["--engine", "transfomers"], 2, "did you mean transformers"),
    "vllm, which is not here": (["--engine", "vllm"], 1, "vllm is not installed, which engine=vllm needs"),
    "an adapter of a run": (["--lora-load", "RUN"], 1, "RUN"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_engine_cannot_do_is_refused_by_name(folder: Path, case: str) -> None:
    flags, status, complaint = REFUSED[case]
    done = call(
        "asd-infer", "generate", "--load", folder, "--prompt", "the", "--engine", "transformers", *flags
    )
    assert (done.status, done.stdout) == (status, ""), done.stderr
    assert complaint in done.complaint


def test_a_native_checkpoint_is_to_be_converted(folder: Path, tmp_path: Path) -> None:
    run_command("asd-ckpt", "convert", "--input-model-dir", folder, "--output-model-dir", tmp_path / "run")
    done = call(
        "asd-infer", "generate", "--load", tmp_path / "run", "--prompt", "the", "--engine", "transformers"
    )
    assert (done.status, done.stdout) == (2, "")
    assert "is of kind native; convert it: asd-ckpt convert --input-model-dir" in done.complaint


def test_how_texts_are_continued_in_words_of_vllm() -> None:
    greedy = sampling_arguments(GenerationSettings(7, eos_token_ids=(2, 9)))
    assert greedy == {
        "max_tokens": 7, "temperature": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [2, 9],
        "ignore_eos": True, "detokenize": False, "logprobs": 0,
    }  # fmt: skip
    drawn = sampling_arguments(
        GenerationSettings(7, SamplingParams(True, 0.5, 30, 0.9, 4, 1.2), (), ("\n",), return_log_probs=True)
    )
    changed = {
        "temperature": 0.5, "top_k": 30, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.2,
        "stop_token_ids": [],
    }  # fmt: skip
    assert drawn == greedy | changed
    with pytest.raises(ConfigError, match=r"temperature=0\.01 to 2\.0, not 3"):
        sampling_arguments(GenerationSettings(7, SamplingParams(True, 3.0)))


def test_a_model_in_words_of_vllm(tmp_path: Path) -> None:
    given = {"load": tmp_path, "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}
    arguments = model_arguments(load_config(GenerateConfig, None, given), tmp_path, "bfloat16", 20)
    layout = {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 2,
        "dtype": "bfloat16",
        "max_lora_rank": 32,
    }
    assert arguments.items() >= layout.items()
    with pytest.raises(ConfigError, match="rank 512 at most, this one has 513"):
        model_arguments(load_config(GenerateConfig, None, given), tmp_path, "bfloat16", 513)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"target_modules": "all-linear"}, None),
        ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}, "has rank_pattern"),
        ({"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 2}}, "has alpha_pattern"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, r"has its own .*model\.norm\.weight"),
        ({"target_modules": ["q_proj", "lm_head"]}, "has .*a head that its embedding is not tied to"),
    ],
    ids=str,
)
def test_adapters_that_vllm_computes_as_peft_does(
    tmp_path: Path, options: dict[str, Any], complaint: str | None
) -> None:
    config = tiny_config(vocab_size=400, tie_word_embeddings="lm_head" in options["target_modules"])
    save_hugging_face(config, tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "adapter", **options)
    if complaint is None:
        assert lora_rank(tmp_path / "adapter", config) == 4
    else:
        with pytest.raises(ConfigError, match=f"{complaint}; merge it: asd-ckpt merge-lora"):
            lora_rank(tmp_path / "adapter", config)


def test_log_probabilities_of_vllm() -> None:
    class Logprob:
        def __init__(self, logprob: float) -> None:
            self.logprob = logprob

    assert log_probs_of([3, 5], [{3: Logprob(-1.0)}, {7: Logprob(-0.1), 5: Logprob(-2.0)}]) == (-1.0, -2.0)
    with pytest.raises(AscendSpeedError, match="a logit of the model is nan, which is not finite"):
        log_probs_of([3, 5], [{3: Logprob(-1.0)}, {5: Logprob(float("nan"))}])


LOG = """
(MainProcess pid=1) WARNING 11-27 07:56:23 [cpu.py:224] Triton is not installed. triton-cpu is expected on x86 CPUs.
(VllmWorker-0 pid=3) ERROR 11-27 07:56:47 [multiproc_executor.py:953] WorkerProc failed to start.
(VllmWorker-0 pid=3) ERROR 11-27 07:56:47 [multiproc_executor.py:953] Traceback (most recent call last):
(VllmWorker-0 pid=3) ERROR 11-27 07:56:47 [multiproc_executor.py:953]     raise ValueError(
(VllmWorker-0 pid=3) ERROR 11-27 07:56:47 [multiproc_executor.py:953] ValueError: Available memory on node 0 is less.
(EngineCore pid=2) ERROR 11-27 07:56:50 [core.py:1510] Exception: WorkerProc initialization failed due to an \
exception in a background process. See stack trace for root cause.
"""


def test_the_cause_of_a_failed_start_is_found_in_the_log_of_vllm() -> None:
    lines = LOG.replace("\\\n", "").splitlines()
    assert cause(lines) == "ValueError: Available memory on node 0 is less"
    assert cause(lines[-1:]) is None
    assert cause(["torch.OutOfMemoryError: CUDA out of memory."]) == "OutOfMemoryError: CUDA out of memory"


def test_arguments_of_an_engine_itself(folder: Path) -> None:
    base = (
        "asd-infer",
        "generate",
        "--load",
        folder,
        "--prompt",
        "the year",
        "--max-new-tokens",
        3,
        "--json",
    )
    plain = call(*base, "--engine", "transformers")
    eager = call(*base, "--engine", "transformers", "--engine-option", "attn-implementation=eager")
    assert (plain.status, eager.status) == (0, 0), eager.stderr
    assert plain.stdout == eager.stdout
    model = load_transformers(str(folder), "float32", "cpu", {"attn_implementation": "eager"})
    assert model.config._attn_implementation == "eager"
    for flags, status, complaint in (
        (["--engine-option", "attn_implementation=eager"], 2, "engine=ascendspeed takes no such options"),
        (["--engine", "transformers", "--engine-option", "attn_implementation"], 2, "is not NAME=VALUE"),
        (["--engine", "transformers", "--engine-option", "attn_implementatoin=eager"], 2,
         "did you mean attn_implementation?"),
        (["--engine", "transformers", "--engine-option", "attn_implementation=fast"], 1, "transformers cannot load"),
        (["--engine", "transformers", "--engine-option", "a=1", "--engine-option", "a=2"], 2, "given twice"),
    ):  # fmt: skip
        done = call(*base, *flags)
        assert (done.status, done.stdout) == (status, ""), done.stderr
        assert complaint in done.complaint


@pytest.mark.parametrize("engine", [TransformersEngine, VllmEngine])
def test_every_option_of_sampling_is_known_or_refused(engine: type[TextEngine]) -> None:
    """None is forgotten: an engine names what exists, and not what is done for it."""
    assert engine.supported_options <= SamplingConfig.model_fields.keys() - COMMON_OPTIONS
    assert SamplingConfig.model_fields.keys() >= COMMON_OPTIONS


def test_the_engine_of_the_guide(folder: Path, tmp_path: Path) -> None:
    """Installed by the text of docs/extending.md alone."""
    document = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(toml|python)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    (table,) = (body for language, body in blocks if language == "toml" and "parrot" in body)
    (program,) = (body for language, body in blocks if language == "python" and "Parrot" in body)
    (name, target) = re.findall(r'^(\w+) = "(\S+)"$', table, re.MULTILINE)[0]
    info = tmp_path / "parrot-1.0.dist-info"
    info.mkdir()
    (tmp_path / "parrot.py").write_text(program)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ascendspeed_infer.engines]\n{name} = {target}\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    command = ("asd-infer", "generate", "--load", folder, "--prompt", "the year", "--engine", "parrot")
    done = run_command(*command, "--max-new-tokens", 5, "--json", PYTHONPATH=path)
    assert done.status == 0, done.stderr
    (answer,) = map(json.loads, done.stdout.splitlines())
    assert answer["token_ids"] == (answer["prompt_token_ids"] * 5)[:5]
    done = run_command(*command, "--do-sample", PYTHONPATH=path)
    assert (done.status, done.stdout) == (2, "")
    assert "engine=parrot does not support do_sample=True" in done.complaint
    said = run_command(
        "asd-infer",
        "chat",
        *command[2:4],
        *command[6:],
        "--chat-template",
        "plain",
        stdin="the\n",
        PYTHONPATH=path,
    )
    assert said.status == 0, said.stderr
    assert f"{ANSWER}" in said.stdout


def test_a_model_has_the_own_engine(folder: Path) -> None:
    engine: TextEngine = LanguageModel.from_pretrained(folder, device="cpu").engine
    assert engine.name == NATIVE
    assert engine.supported_options == SamplingConfig.model_fields.keys()
    with pytest.raises(
        ConfigError, match="engine=none is not installed; known are ascendspeed, transformers, vllm"
    ):
        find_engine("none")


def test_code_of_a_model_folder_never_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "model").mkdir()
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "model/config.json").write_text(
        json.dumps({"model_type": "unheard-of", "auto_map": auto_map})
    )
    (tmp_path / "model/code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    with pytest.raises(AscendSpeedError, match="transformers cannot load") as caught:
        load_transformers(str(tmp_path / "model"), "float32", "cpu")
    assert "\n" not in str(caught.value)
    assert not ran.exists()
