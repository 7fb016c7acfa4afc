"""A LoRA adapter gives peft's logits and the recorded ids, merged or beside the weights, under every layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_eval.model import LoglikelihoodRequest
from ascendspeed_infer.eval_backend import backend
from ascendspeed_infer.language_model import LanguageModel
from support.commands import call
from support.families import REFERENCES
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool
from support.shared_data import STORIES, needs_shared_data

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
Ids = list[int]


def make_adapter(base: Path, folder: Path, **options: Any) -> Any:
    """Make a random adapter with peft, save it, and return peft's model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture(scope="module")
def undone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and an adapter that together are the trained model."""
    folder = tmp_path_factory.mktemp("stories")
    make_adapter(STORIES, folder / "adapter", target_modules="all-linear")
    shutil.copytree(STORIES, folder / "base")
    # The session's shared files may be read-only.
    (folder / "base" / "model.safetensors").chmod(0o644)
    (folder / "base").chmod(0o755)
    weights = load_file(STORIES / "model.safetensors")
    lora = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name in [name for name in lora if name.endswith("lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        added = lora[name.replace("lora_A", "lora_B")].double() @ lora[name].double() * (12 / 4)
        weights[f"{module}.weight"] = (weights[f"{module}.weight"].double() - added).float()
    (folder / "base" / "model.safetensors").unlink()
    save_file(weights, folder / "base" / "model.safetensors", {"format": "pt"})
    return folder


def greedy(
    folder: str, adapter: str | None, prompts: list[Ids], new: int, merge: bool, tp: int, pp: int
) -> list[Ids]:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model = LanguageModel.from_pretrained(
        folder, device="cpu", parallel=parallel, adapter=adapter, merge_adapter=merge
    )
    found = model.generate(prompts, max_new_tokens=new, ignore_eos=True)
    return [[*ids, *one.token_ids] for ids, one in zip(prompts, found, strict=True)]


@needs_shared_data
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_recorded_greedy_ids(workers: WorkerPool, undone: Path, tp: int, pp: int) -> None:
    cases = json.loads((STORIES / "expected.json").read_text(encoding="utf-8"))["cases"]
    prompts, want = [case["prompt_ids"] for case in cases], [case["greedy_ids"] for case in cases]
    new = len(want[0]) - len(prompts[0])
    for merge in (True, False):
        arguments = (str(undone / "base"), str(undone / "adapter"), prompts, new, merge, tp, pp)
        for found in workers.run(greedy, tp * pp, *arguments):
            assert found == want
    if tp * pp == 1:
        (without,) = workers.run(greedy, 1, str(undone / "base"), None, prompts, new, True, 1, 1)
        assert all(ids != other for ids, other in zip(without, want, strict=True))


def logits(folder: str, adapter: str, merge: bool, tokenizer: str, tp: int, pp: int) -> torch.Tensor:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model = LanguageModel.from_pretrained(
        folder, tokenizer=tokenizer, device="cpu", parallel=parallel, adapter=adapter, merge_adapter=merge
    )
    return model.logits([5, 17, 99, 3, 41, 77])


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of few pieces: the reference models have 125 ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    return folder


FAMILIES: dict[str, dict[str, Any]] = {
    "LLaMA with all biases": {"target_modules": "all-linear"},
    "Qwen 3": {"target_modules": ["k_proj", "o_proj", "down_proj", "lm_head"]},
    "Mistral": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "Bloom": {"target_modules": ["query_key_value", "dense_h_to_4h", "dense"]},
}


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_peft(
    workers: WorkerPool, tmp_path: Path, small_tokenizer: Path, name: str, tp: int, pp: int
) -> None:
    REFERENCES[name].save(tmp_path / "base")
    peft = make_adapter(tmp_path / "base", tmp_path / "adapter", **FAMILIES[name])
    with torch.no_grad():
        want = peft(torch.tensor([[5, 17, 99, 3, 41, 77]])).logits[0]
    for merge in (True, False):
        arguments = (str(tmp_path / "base"), str(tmp_path / "adapter"), merge, str(small_tokenizer), tp, pp)
        for found in workers.run(logits, tp * pp, *arguments):
            # fp32 sums in another order; logits are of the order of 10.
            torch.testing.assert_close(found, want, rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_hugging_face(tiny_config(vocab_size=400), folder / "hf", tokenizer=tokenizer_folder)
    make_adapter(folder / "hf", folder / "adapter", target_modules="all-linear")
    make_adapter(folder / "hf", folder / "embedding", target_modules=["embed_tokens", "q_proj"])
    return folder


def test_every_kind_of_checkpoint(base: Path, tmp_path: Path) -> None:
    """The same ids from all of them, with the adapter merged and beside."""
    options: dict[str, Any] = {"tokenizer": base / "hf", "device": "cpu", "adapter": base / "adapter"}
    want = LanguageModel.from_pretrained(base / "hf", **options).generate("the year", max_new_tokens=12)
    for kind in ("native", "ascendspeed", "megatron"):
        cut = (
            [] if kind == "native" else [f"--{name}-model-parallel-size=2" for name in ("tensor", "pipeline")]
        )
        done = call(
            "asd-ckpt", "convert", "--load", base / "hf", "--save", tmp_path / kind, "--to", kind, *cut
        )
        assert done.status == 0, done.stderr
        for merge in (True, False):
            model = LanguageModel.from_pretrained(tmp_path / kind, **options, merge_adapter=merge)
            assert model.generate("the year", max_new_tokens=12) == want


def test_on_the_command_line(base: Path) -> None:
    flags: list[object] = [
        "--load",
        base / "hf",
        "--prompt",
        "the year",
        "--max-new-tokens",
        9,
        "--device",
        "cpu",
    ]
    plain, merged, beside = (
        call("asd-infer", "generate", *flags, *more).stdout
        for more in (
            (),
            ("--lora-load", base / "adapter"),
            ("--adapter", base / "adapter", "--no-merge-adapter"),
        )
    )
    assert merged == beside != plain
    idle = call("asd-infer", "generate", *flags, "--no-merge-adapter")
    assert idle.status == 2
    assert "there is no adapter; give --lora-load DIR" in idle.complaint
    missing = call("asd-infer", "generate", *flags, "--lora-load", "/nowhere")
    assert missing.status == 1
    assert "/nowhere does not exist; check --lora-load" in missing.complaint


def test_an_evaluated_model_has_its_adapter(base: Path) -> None:
    """Merged or beside the weights; a score without it is another."""

    def score(**options: Any) -> float:
        with backend.open({"load": str(base / "hf"), "device": "cpu", **options}) as model:
            (found,) = model.loglikelihood([LoglikelihoodRequest("the year", " was good")])
        return found.logprob

    plain, adapter = score(), str(base / "adapter")
    merged, beside = score(lora_load=adapter), score(lora_load=adapter, merge_adapter=False)
    assert abs(merged - plain) > 1e-2
    # fp32: the weights' sum is rounded, or the results' sum.
    assert abs(merged - beside) < 1e-4


def test_the_adapters_own_tokenizer_is_used(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "adapter", tmp_path / "adapter")
    shutil.copy(base / "hf" / "tokenizer.model", tmp_path / "adapter")
    model = LanguageModel.from_pretrained(base / "hf", device="cpu", adapter=tmp_path / "adapter")
    assert model.tokenizer.path == tmp_path / "adapter"


def test_an_embedding_is_only_merged(base: Path) -> None:
    merged = LanguageModel.from_pretrained(base / "hf", device="cpu", adapter=base / "embedding")
    assert merged.generate("a", max_new_tokens=2)
    with pytest.raises(AscendSpeedError, match="no plain linear layer; merge the adapter"):
        LanguageModel.from_pretrained(
            base / "hf", device="cpu", adapter=base / "embedding", merge_adapter=False
        )
    with pytest.raises(ConfigError, match="there is no adapter"):
        LanguageModel.from_pretrained(base / "hf", device="cpu", merge_adapter=False)
