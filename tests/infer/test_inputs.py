"""Numbers that are none end what they would spoil, by name; errors of prompts say which; ids need no tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.sampling import SamplingParams, sample_token
from support.commands import call
from support.models import save_hugging_face, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_hugging_face(
        tiny_config(vocab_size=400, max_position_embeddings=128), path, tokenizer=tokenizer_folder
    )
    return path


@pytest.fixture(scope="module")
def spoilt(folder: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The embedding of one id is not a number: texts without it are as before."""
    path = tmp_path_factory.mktemp("spoilt")
    save_hugging_face(
        tiny_config(vocab_size=400, max_position_embeddings=128), path, tokenizer=tokenizer_folder
    )
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][300] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return path


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"do_sample": True},
    "drawn with filters": {"do_sample": True, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2},
    "beams": {"num_beams": 2},
    "drawn beams": {"num_beams": 2, "do_sample": True},
    "batch-invariant": {"batch_invariant": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_logits_that_are_not_finite_name_the_prompt(spoilt: Path, way: str) -> None:
    model = LanguageModel.from_pretrained(spoilt, device="cpu")
    prompts = [[1, 5, 6], [1, 300, 6], [1, 7]]
    with pytest.raises(AscendSpeedError, match=r"prompt 2: a logit of the model is nan"):
        model.generate(prompts, max_new_tokens=4, **WAYS[way])
    with pytest.raises(AscendSpeedError, match="is nan"):
        list(model.generate([1, 300], max_new_tokens=4, stream=True))
    assert len(model.generate([prompts[0], prompts[2]], max_new_tokens=4, **WAYS[way])) == 2


def test_scores_that_are_not_finite_are_refused(spoilt: Path) -> None:
    model = LanguageModel.from_pretrained(spoilt, device="cpu")
    with pytest.raises(AscendSpeedError, match="pair 2 is nan"):
        model.loglikelihood_of_ids([([1, 5], [6]), ([1, 300], [6])])


@pytest.mark.parametrize("backend", [["--load"], ["--device", "cpu", "--load"], ["--transformers-model"]])
def test_an_evaluation_goes_on_without_the_samples_that_are_not_finite(
    spoilt: Path, tmp_path: Path, backend: list[str]
) -> None:
    model = LanguageModel.from_pretrained(spoilt, device="cpu")
    piece = model.tokenizer.convert_ids_to_tokens([300])[0].replace("\u2581", " ")
    for task, asked in (("gsm8k", {"answer": "#### 3"}), ("boolq", {"answer": True, "passage": "p"})):
        data = tmp_path / f"{task}.jsonl"
        questions = ["the of", f"the{piece} of", "and"]
        data.write_text("".join(json.dumps({"question": q, **asked}) + "\n" for q in questions))
        done = call(
            "asd-eval", "run", "--task", task, "--num-fewshot", 0, "--task-data-path", data, *backend, spoilt,
            "--output-dir", tmp_path / task, *(["--max-new-tokens", 4] if task == "gsm8k" else []),
        )  # fmt: skip
        assert done.status == 1
        failed = [json.loads(line) for line in (tmp_path / task / "failed.jsonl").read_text().splitlines()]
        assert [one["id"] for one in failed] == [f"{task}-2"]
        assert "nan, which is not finite" in failed[0]["reason"]
        assert len((tmp_path / task / "samples.jsonl").read_text().splitlines()) == 2


def test_a_temperature_that_makes_scores_infinite_is_named() -> None:
    params = SamplingParams(do_sample=True, temperature=1e-38)
    logits = torch.tensor([10.0, 20.0, 30.0])
    with pytest.raises(ConfigError, match="temperature=1e-38 makes scores of tokens infinite"):
        sample_token(logits, params, params.noise(params.generator(), 3))


def test_ids_in_and_out_need_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        if "token" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    (tmp_path / "ids.jsonl").write_text('{"prompt_token_ids": [1, 5, 6]}\n[1, 7]\n')
    words = ["asd-infer", "generate", "--device", "cpu", "--max-new-tokens", 4, "--json"]
    asked = [*words, "--load", bare, "--prompt-file", tmp_path / "ids.jsonl"]
    done = call(*asked, "--no-detokenize")
    assert done.status == 0, done.stderr
    whole = call(*words, "--load", folder, "--prompt-file", tmp_path / "ids.jsonl", "--no-detokenize")
    assert done.stdout == whole.stdout
    assert [json.loads(line)["prompt_token_ids"] for line in done.stdout.splitlines()] == [[1, 5, 6], [1, 7]]
    refused = call(*asked)
    assert (refused.status, "came without a tokenizer" in refused.complaint) == (1, True)
    (tmp_path / "text.jsonl").write_text('[1, 7]\n"the year"\n')
    refused = call(*words, "--load", bare, "--prompt-file", tmp_path / "text.jsonl", "--no-detokenize")
    assert refused.status == 1
    assert "text.jsonl, line 2: a text needs a tokenizer" in refused.complaint


def test_half_an_emoji_is_refused_by_line(folder: Path) -> None:
    model = LanguageModel.from_pretrained(folder, device="cpu")
    complaint = r"prompt 2: the text holds half a surrogate pair \(\\ud83d at character 5"
    with pytest.raises(AscendSpeedError, match=complaint):
        model.generate(["the", "the \ud83d"], max_new_tokens=2)
