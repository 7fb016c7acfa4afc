"""Generation is transformers' own, under every layout; options mean what they say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.tokenizer import load_tokenizer
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.sampling import SamplingParams, keep_top_k, keep_top_p, sample_token
from support.commands import call, run_command
from support.models import save_hugging_face, tiny_config

PROMPTS = ["the year", "it was a", "中文 and"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_hugging_face(tiny_config(vocab_size=400), path, tokenizer=tokenizer_folder)
    return path


def theirs(folder: Path, prompt: str, new_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([load_tokenizer(folder).encode(prompt)])
    with torch.no_grad():
        whole = model.generate(
            ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=2, pad_token_id=0
        )
    return [int(token) for token in whole[0, ids.shape[1] :]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_ids_equal_transformers(folder: Path, prompt: str) -> None:
    (completion,) = LanguageModel.from_pretrained(folder, device="cpu").generate(prompt, max_new_tokens=20)
    want = theirs(folder, prompt, 20)
    assert list(completion.token_ids) == want
    assert completion.finish_reason == ("stop" if want[-1] == 2 else "length")


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_json_on_the_command_line(folder: Path, tp: int, pp: int) -> None:
    # The first process reads stdin, whatever its length, and tells the others.
    prompts, stdin = (["--prompt", *PROMPTS], "") if pp > 1 else ([], "\n".join(PROMPTS) + "\n")
    run = call if tp * pp == 1 else run_command
    done = run(
        "asd-infer", "generate", "--load", folder, *prompts, "--max-new-tokens", 12, "--json", "--device", "cpu",
        "--nproc-per-node", tp * pp, "--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp,
        stdin=stdin,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    for line in lines:
        assert line["token_ids"] == theirs(folder, line["prompt"], 12)
        assert line["finish_reason"] in ("length", "stop")
        assert isinstance(line["text"], str)
        assert line["prompt_token_ids"] == load_tokenizer(folder).encode(line["prompt"])


def test_texts_on_stdout_and_the_rest_on_stderr(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags: list[object] = ["--load", folder, "--max-new-tokens", 3, "--device", "cpu"]
    from_file = call("asd-infer", "generate", *flags, "--prompt-file", tmp_path / "prompts.txt")
    from_stdin = call("asd-infer", "generate", *flags, stdin="\n".join(PROMPTS))
    from_flags = call("asd-infer", "generate", *flags, "--prompt", *PROMPTS)
    assert from_file.stdout == from_stdin.stdout == from_flags.stdout
    assert "tokens/s" in from_flags.stderr
    echoed = call("asd-infer", "generate", *flags, "--prompt", "the year", "--echo")
    assert echoed.stdout.startswith("the year")


def test_prompts_as_json_lines(folder: Path, tmp_path: Path) -> None:
    ids = load_tokenizer(folder).encode("the year")
    lines = ["it\nwas", {"prompt": "it was\u2028a", "id": 7}, ids, {"prompt_token_ids": ids}]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    flags: list[object] = ["--load", folder, "--max-new-tokens", 3, "--device", "cpu", "--json"]
    by_name = call("asd-infer", "generate", *flags, "--prompt-file", tmp_path / "p.jsonl")
    assert by_name.status == 0, by_name.stderr
    from_stdin = call(
        "asd-infer", "generate", *flags, "--prompt-format", "jsonl", stdin=(tmp_path / "p.jsonl").read_text()
    )
    assert by_name.stdout == from_stdin.stdout
    found = [json.loads(line) for line in by_name.stdout.split("\n")[:-1]]
    assert [one["prompt"] for one in found[:2]] == ["it\nwas", "it was\u2028a"]
    assert [one["prompt_token_ids"] for one in found[2:]] == [ids, ids]
    assert found[2]["token_ids"] == found[3]["token_ids"] == theirs(folder, "the year", 3)
    # What was not asked for is not there.
    assert found[1].pop("id") == 7
    assert (
        set(found[0]) == set(found[1]) == {"prompt", "text", "token_ids", "finish_reason", "prompt_token_ids"}
    )
    drawn = [{"prompt": "it", "seed": seed, "n": [seed]} for seed in (5, 6, 5)]
    more = ["--prompt-format", "jsonl", "--do-sample", "--ignore-eos"]
    own = call("asd-infer", "generate", *flags, *more, stdin="\n".join(map(json.dumps, drawn)))
    one, two, three = map(json.loads, own.stdout.splitlines())
    assert one == three
    assert (two["n"], two["token_ids"] == one["token_ids"]) == ([6], False)
    (same,) = LanguageModel.from_pretrained(folder, device="cpu").generate(
        "it", max_new_tokens=3, do_sample=True, ignore_eos=True, seed=6
    )
    assert two["token_ids"] == list(same.token_ids)
    scored = call("asd-infer", "generate", *flags, "--prompt", "it", "--return-log-probs", "--no-detokenize")
    (one,) = map(json.loads, scored.stdout.splitlines())
    assert len(one["log_probs"]) == 3
    assert one["text"] == ""


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "the"}', "stdin, line 2 holds no prompt; give a text"),
        ('{"prompt": "the", "prompt_token_ids": [5]}', "stdin, line 2 holds no prompt"),
        ("[1.5]", "stdin, line 2 holds no prompt"),
        ('{"prompt": "the", "seed": "x"}', "stdin, line 2: seed='x' is not a whole number"),
        ('{"prompt": "the", "text": "x"}', "line 2: text is a field of the answer"),
        ("{", "stdin, line 2 is not JSON"),
    ],
)
def test_lines_that_are_no_prompts(folder: Path, line: str, complaint: str) -> None:
    flags = ["--load", folder, "--device", "cpu", "--prompt-format", "jsonl", "--json"]
    done = call("asd-infer", "generate", *flags, stdin=f'"the"\n{line}\n')
    assert done.status == 1
    assert complaint in done.complaint
    assert done.stdout == ""


def test_lines_end_where_lines_end(folder: Path) -> None:
    flags: list[object] = ["--load", folder, "--max-new-tokens", 4, "--device", "cpu", "--json"]
    found = call("asd-infer", "generate", *flags, stdin="the year\x0bit was\r\n" * 3)
    assert [json.loads(line)["prompt"] for line in found.stdout.splitlines()] == ["the year\x0bit was"] * 3
    nothing = call("asd-infer", "generate", *flags)
    assert nothing.status == 2
    assert "no prompt given (stdin is empty)" in nothing.complaint


def test_completions_come_as_they_are_ready(folder: Path) -> None:
    model = LanguageModel.from_pretrained(folder, device="cpu")
    prompts = [f"the year {number}" for number in range(20)]
    passes: list[int] = []
    hook = model.model.register_forward_hook(lambda module, inputs, output: passes.append(1))
    found = model.completions(prompts, max_new_tokens=3, batch_size=2, ignore_eos=True)
    assert passes == []
    first = next(found)
    # The prompt, and two tokens.
    assert len(passes) == 3
    assert [one for several in (first, *found) for one in several] == model.generate(
        prompts, max_new_tokens=3, ignore_eos=True
    )
    hook.remove()
    with pytest.raises(AscendSpeedError, match="max_position_embeddings"):
        # Before anything is computed.
        model.completions([*prompts, "the year " * 40])


def test_random_weights_by_name(folder: Path) -> None:
    flags: list[object] = [
        "--model-config", folder / "config.json", "--tokenizer-name-or-path", folder, "--prompt", "the", "--json",
        "--max-new-tokens", 8, "--device", "cpu",
    ]  # fmt: skip
    first, again, other = (call("asd-infer", "generate", *flags, "--seed", seed) for seed in (3, 3, 4))
    assert first.stdout == again.stdout
    assert first.stdout != other.stdout


def test_sampling_is_reproducible_and_seeds_matter(folder: Path) -> None:
    model = LanguageModel.from_pretrained(folder, device="cpu")

    def ids(**options: object) -> tuple[int, ...]:
        return model.generate("the", max_new_tokens=16, do_sample=True, **options)[0].token_ids  # type: ignore[arg-type]

    assert ids(seed=1) == ids(seed=1) != ids(seed=2)
    greedy = model.generate("the", max_new_tokens=16)[0].token_ids
    assert ids(seed=1, top_k=1) == greedy
    assert ids(seed=1, temperature=1e-4) == greedy


@pytest.mark.parametrize("k", [0, 1, 5, 400, 1000])
def test_top_k_keeps_what_transformers_keeps(k: int) -> None:
    scores = torch.randn(400, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    want = TopKLogitsWarper(k)(None, scores[None])[0] if k else scores
    assert torch.equal(keep_top_k(scores, k), want)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_what_transformers_keeps(p: float) -> None:
    scores = torch.randn(400, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 3
    want = TopPLogitsWarper(p)(None, scores[None])[0] if p < 1 else scores
    assert torch.equal(keep_top_p(scores, p), want)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampling = SamplingParams(do_sample=True, temperature=0.7, seed=5)
    generator = sampling.generator()
    counts = torch.zeros(4)
    for _ in range(20_000):
        counts[sample_token(logits, sampling, sampling.noise(generator, 4)).token_id] += 1
    # 20,000 draws: one standard deviation is at most 0.0035.
    assert torch.allclose(counts / 20_000, (logits / 0.7).softmax(-1), atol=0.014)


def test_stop_texts_and_end_ids(folder: Path) -> None:
    model = LanguageModel.from_pretrained(folder, device="cpu")
    (free,) = model.generate("it was a", max_new_tokens=20, ignore_eos=True)
    assert (free.finish_reason, len(free.token_ids)) == ("length", 20)
    stop = free.text[4:7]
    (stopped,) = model.generate("it was a", max_new_tokens=20, ignore_eos=True, stop=[stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text.partition(stop)[0]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]


BAD: dict[str, tuple[list[object], int, str]] = {
    "no model": (["--prompt", "x"], 2, "neither of --load and --model-config given"),
    "a checkpoint that is not": (["--load", "/nowhere", "--prompt", "x"], 1, "checkpoint /nowhere does not exist"),
    "a prompt that is too long": (["{model}", "--prompt", "the year " * 40], 1, "more than max_position_embeddings"),
    "more tokens than fit": (["{model}", "--prompt", "x", "--max-new-tokens", 500], 1, "shorten the prompt or ask for"),
    "no tokens": (["{model}", "--prompt", "x", "--max-new-tokens", 0], 2, "max_new_tokens"),
    "a temperature of 0": (["{model}", "--prompt", "x", "--do-sample", "--temperature", 0], 2, "temperature=0"),
    "a top-p above 1": (["{model}", "--prompt", "x", "--top-p", 1.5], 2, "top_p=1.5"),
    "two sources of prompts": (["{model}", "--prompt", "x", "--prompt-file", "y"], 2, "give one"),
    "a file that is not": (["{model}", "--prompt-file", "/nowhere/p"], 1, "prompt_file=/nowhere/p does not exist"),
    "JSON that is not": (["{model}", "--prompt-format", "jsonl"], 1, "stdin, line 1 is not JSON"),
    "JSON lines as flags": (["{model}", "--prompt", "x", "--prompt-format", "jsonl"], 2, "--prompt takes texts"),
    "ids as text": (["{model}", "--prompt", "x", "--no-detokenize"], 2, "printed with --json; add it"),
    "processes that repeat each other": (["{model}", "--prompt", "x", "--nproc-per-node", 2], 2, "the same 2 times"),
    "heads that do not divide": (
        ["{model}", "--prompt", "x", "--tensor-model-parallel-size", 3, "--nproc-per-node", 3],
        2,
        "does not divide num_attention_heads=8",
    ),
    "a layout of training": (["{model}", "--sequence-parallel", "--prompt", "x"], 2, "--sequence-parallel: leave it"),
    "another architecture": (["{model}", "--prompt", "x", "--num-layers", 7], 1, "num_layers=7 contradicts"),
    "another tokenizer": (["{model}", "--prompt", "x", "--tokenizer-type", "Other"], 2, "tokenizer_type=Other"),
    "a flag that is not": (["{model}", "--promt", "x"], 2, "did you mean --prompt?"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(folder: Path, case: str) -> None:
    flags, status, complaint = BAD[case]
    if flags[0] == "{model}":
        flags = ["--load", folder, *flags[1:]]
    done = call("asd-infer", "generate", *flags, "--device", "cpu", stdin="a line\n")
    assert done.status == status, done.stderr
    assert complaint in done.complaint
    assert done.stdout == ""


def test_layouts_of_training(folder: Path) -> None:
    for field in ({"use_distributed_optimizer": True}, {"sequence_parallel": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(field))}=True is for training"):
            LanguageModel.from_pretrained(folder, device="cpu", parallel=ParallelConfig(**field))


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    save_hugging_face(tiny_config(vocab_size=400), tmp_path)
    with pytest.raises(AscendSpeedError, match="came without a tokenizer; give --tokenizer-name-or-path"):
        LanguageModel.from_pretrained(tmp_path, device="cpu")


def test_a_tokenizer_larger_than_the_model(tmp_path: Path, tokenizer_folder: Path) -> None:
    save_hugging_face(tiny_config(vocab_size=300), tmp_path)
    with pytest.raises(AscendSpeedError, match="has vocab_size=400, the model 300"):
        LanguageModel.from_pretrained(tmp_path, tokenizer=tokenizer_folder, device="cpu")
