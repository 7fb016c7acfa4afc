"""`LanguageModel.generate`: every option means what it says, and draws are those of transformers."""

import random
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM

from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.tokenizer import load_tokenizer
from ascendspeed_infer.config import SamplingConfig
from ascendspeed_infer.detokenizer import Detokenizer
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.legacy_options import IGNORED_OPTIONS, RENAMED_OPTIONS
from ascendspeed_infer.requests import GenerateOptions
from ascendspeed_infer.sampling import SamplingParams, sample_token
from support.corpus import make_chat_tokenizer
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool

PROMPTS = ["the year", "it was a time of", "中文 and", "a"]
RULES: dict[str, dict[str, Any]] = {
    "plain draws": {"do_sample": True},
    "temperature and filters": {"do_sample": True, "temperature": 0.6, "top_k": 30, "top_p": 0.8},
    "greedy without repeats": {"repetition_penalty": 1.5},
    "draws without repeats": {"do_sample": True, "repetition_penalty": 1.3, "top_p": 0.9},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_hugging_face(tiny_config(vocab_size=400), path, tokenizer=tokenizer_folder)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("case", RULES)
def test_texts_are_those_of_transformers(model: LanguageModel, reference: Any, case: str) -> None:
    """With the same seed also the draws are."""
    options = {"top_k": 0} | RULES[case]
    for seed, prompt in enumerate(PROMPTS):
        ids = model.tokenizer.encode(prompt)
        torch.manual_seed(seed)
        whole = reference.generate(
            torch.tensor([ids]), max_new_tokens=16, eos_token_id=[2, 9], pad_token_id=0, **options
        )
        (found,) = model.generate(prompt, max_new_tokens=16, eos_token_ids=[2, 9], seed=seed, **RULES[case])  # type: ignore[arg-type]
        assert list(found.token_ids) == whole[0, len(ids) :].tolist()


def test_a_seed_for_each_prompt(model: LanguageModel) -> None:
    options: GenerateOptions = {"max_new_tokens": 12, "do_sample": True, "ignore_eos": True}
    want = [model.generate(prompt, seed=seed, **options)[0] for seed, prompt in enumerate(PROMPTS)]
    assert model.generate(PROMPTS, seeds=range(4), **options) == want
    with pytest.raises(ConfigError, match="3 seeds were given for 4 prompts"):
        model.generate(PROMPTS, seeds=[1, 2, 3], **options)
    with pytest.raises(ConfigError, match="give seed with stream"):
        model.generate("the", stream=True, seeds=[1])  # type: ignore[call-overload]


def several(folder: str, tp: int, pp: int) -> list[tuple[int, ...]]:
    """Draws of several prompts in one batch."""
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model = LanguageModel.from_pretrained(folder, device="cpu", parallel=parallel)
    found = model.generate(PROMPTS, max_new_tokens=20, do_sample=True, top_p=0.95, seed=5, ignore_eos=True)
    return [one.token_ids for one in found]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_draws_depend_on_the_seed_alone(
    workers: WorkerPool, folder: Path, model: LanguageModel, tp: int, pp: int
) -> None:
    """Not on company, order or layout."""
    options: GenerateOptions = {"max_new_tokens": 20, "do_sample": True, "top_p": 0.95, "ignore_eos": True}
    want = [model.generate(prompt, seed=5, **options)[0].token_ids for prompt in PROMPTS]
    assert len(set(want)) == len(PROMPTS)
    for found in workers.run(several, tp * pp, str(folder), tp, pp):
        assert found == want
    backwards = model.generate(PROMPTS[::-1], seed=5, batch_size=3, **options)
    assert [one.token_ids for one in backwards] == want[::-1]
    assert [one.prompt for one in backwards] == PROMPTS[::-1]


def test_a_close_draw_is_known_as_such() -> None:
    """The margin is by how much a logit must grow for another token to win: a little more, and it does."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    for sampling in (
        SamplingParams(),
        SamplingParams(do_sample=True, temperature=0.7),
        SamplingParams(repetition_penalty=1.5),
    ):
        noise = sampling.noise(torch.Generator().manual_seed(2), 50)
        choice = sample_token(logits, sampling, noise, [3, 4])
        for other in range(50):
            if other != choice.token_id:
                more = logits.clone()
                more[other] += choice.margin * 0.999
                assert sample_token(more, sampling, noise, [3, 4]).token_id == choice.token_id
        if sampling.repetition_penalty == 1:
            grown = (logits + choice.margin * 1.001 * (torch.arange(50) != choice.token_id)).float()
            assert sample_token(grown, sampling, noise).token_id != choice.token_id


def test_draws_are_those_of_multinomial() -> None:
    chances = torch.randn(1000, generator=torch.Generator().manual_seed(3)).softmax(-1)
    for seed in range(50):
        sampling = SamplingParams(do_sample=True, seed=seed)
        noise = sampling.noise(sampling.generator(), 1000)
        want = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(seed))
        assert sample_token(chances.log(), sampling, noise).token_id == int(want)


def test_several_completions_of_a_prompt(model: LanguageModel) -> None:
    options: GenerateOptions = {"max_new_tokens": 12, "do_sample": True, "ignore_eos": True}
    found = model.generate(PROMPTS[:2], num_return_sequences=3, seed=7, **options)
    assert [one.prompt for one in found] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    want = [
        model.generate(prompt, seed=seed, **options)[0].token_ids
        for prompt in PROMPTS[:2]
        for seed in (7, 8, 9)
    ]
    assert [one.token_ids for one in found] == want
    best, second = model.generate(PROMPTS[0], num_beams=3, num_return_sequences=2, max_new_tokens=12)
    assert best.score is not None
    assert second.score is not None
    assert best.score >= second.score


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "temperature": 0.5, "top_k": 4}, {"num_beams": 3}]
)
def test_log_probabilities_are_the_models_own(model: LanguageModel, options: dict[str, Any]) -> None:
    """Before temperature and filters: those of scoring."""
    for one in model.generate(PROMPTS, max_new_tokens=9, return_log_probs=True, **options):
        ids = [*one.prompt_token_ids, *one.token_ids]
        scores = model.logits(ids).log_softmax(-1)[len(one.prompt_token_ids) - 1 : -1]
        want = scores.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        assert one.log_probs is not None
        # fp32 sums in another order.
        torch.testing.assert_close(torch.tensor(one.log_probs), want, rtol=0, atol=2e-5)
    assert model.generate("a", max_new_tokens=2)[0].log_probs is None


def test_ids_in_and_out(model: LanguageModel) -> None:
    texts = model.generate(PROMPTS[:2], max_new_tokens=6)
    ids = [list(one.prompt_token_ids) for one in texts]
    assert [one.token_ids for one in model.generate(ids, max_new_tokens=6)] == [
        one.token_ids for one in texts
    ]
    (alone,) = model.generate(ids[0], max_new_tokens=6, detokenize=False)
    assert (alone.token_ids, alone.text) == (texts[0].token_ids, "")
    with pytest.raises(ConfigError, match="prompt id 400 is not in 0 to 399"):
        model.generate([1, 400])


@pytest.mark.parametrize("count", [1, 2, 13])
def test_the_number_of_new_tokens_is_exact(model: LanguageModel, count: int) -> None:
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        (one,) = model.generate("the", max_new_tokens=count, ignore_eos=True, **options)  # type: ignore[arg-type]
        assert (len(one.token_ids), one.finish_reason) == (count, "length")
        length = len(one.prompt_token_ids) + count
        (same,) = model.generate("the", max_length=length, ignore_eos=True, **options)  # type: ignore[arg-type]
        assert same.token_ids == one.token_ids


def test_streams_are_the_whole_text(model: LanguageModel) -> None:
    for seed, prompt in enumerate(PROMPTS):
        options: GenerateOptions = {"max_new_tokens": 40, "do_sample": True, "seed": seed, "ignore_eos": True}
        (whole,) = model.generate(prompt, return_log_probs=True, **options)
        steps = list(model.generate(prompt, stream=True, return_log_probs=True, **options))
        assert "".join(step.text for step in steps) == whole.text
        assert tuple(step.token_id for step in steps) == whole.token_ids
        assert tuple(step.log_prob for step in steps) == whole.log_probs
        assert [step.finish_reason for step in steps] == [None] * 39 + ["length"]
        assert sum(1 for step in steps if step.text) > 10
        stop = whole.text[9:12]
        cut = list(model.generate(prompt, stream=True, stop=stop, echo=True, **options))
        assert "".join(step.text for step in cut) == prompt + whole.text.partition(stop)[0]
        assert cut[-1].finish_reason == "stop"


def test_incomplete_characters_and_stops_are_held_back(model: LanguageModel) -> None:
    prompt = model.tokenizer.encode("a")
    # No piece of a vocabulary of 400: three bytes, three ids.
    snow = model.tokenizer.encode("☃", add_special_tokens=False)[-3:]
    ids = [*model.tokenizer.encode("it", add_special_tokens=False), *snow]
    text = Detokenizer(model.tokenizer, prompt, (), ())
    shown = [text.next_text(ids[: end + 1], end == len(ids) - 1) for end in range(len(ids))]
    assert shown[-3:] == ["", "", "☃"]
    assert "".join(shown) == text.decode(ids)
    stops = Detokenizer(model.tokenizer, prompt, (), ("it☃☃",))
    assert "".join(stops.next_text(ids[: end + 1], False) for end in range(len(ids))).strip() == ""
    assert stops.next_text(ids, True).strip() == "it☃"


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_long_texts_grow_as_they_are(model: LanguageModel, tmp_path: Path, kind: str) -> None:
    """Any ids, also bytes that are no character, before and after texts are settled."""
    tokenizer = model.tokenizer
    if kind == "byte level":
        make_chat_tokenizer(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
    for seed in range(8):
        draw = random.Random(seed)
        ids = [draw.randrange(3, tokenizer.vocab_size) for _ in range(300)]
        prompt, skipped = ids[:20], ids[20:22]
        text = Detokenizer(tokenizer, prompt, skipped, ())
        new = ids[22:]
        shown = [text.next_text(new[: end + 1], end == len(new) - 1) for end in range(len(new))]
        whole = text.decode(new)
        assert "".join(shown) == whole
        assert sum(map(bool, shown)) > 100
        # A stop text is found as soon as it is there, wherever it begins.
        start = draw.randrange(len(whole) - 6)
        stop = whole[start : start + 5]
        if "\ufffd" not in stop:
            stops = Detokenizer(tokenizer, prompt, skipped, (stop,))
            first = next(end for end in range(len(new)) if stop in text.decode(new[: end + 1]))
            assert [stops.has_stop_string(new[: end + 1]) for end in range(first + 1)] == [False] * first + [
                True
            ]


def test_of_several_stops_the_first_in_the_text_counts(model: LanguageModel) -> None:
    (free,) = model.generate("it was", max_new_tokens=30, ignore_eos=True)
    early, late = free.text[5:8], free.text[10:13]
    text = Detokenizer(model.tokenizer, free.prompt_token_ids, (), (late, early))
    want = free.text[: min(free.text.find(early), free.text.find(late))]
    assert text.final_text(free.token_ids) == want


def test_names_of_2023(model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    (new,) = model.generate("the year", max_new_tokens=5, echo=True, return_log_probs=True, eos_token_ids=[3])
    (old,) = model.generate(
        "the year", max_new_tokens=5, include_input=True, return_output_log_probs=True, eos_token_id=3, recompute=True,
    )  # fmt: skip
    assert new == old
    assert new.text.startswith("the year")
    assert "recompute has no effect: keys and values are always kept" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="include_input and echo are the same option"):
        model.generate("a", echo=True, include_input=True)
    with pytest.raises(ConfigError, match=r"option of LanguageModel\.from_pretrained"):
        model.generate("a", tokenizer="x")  # type: ignore[call-overload]


def test_types_name_every_option() -> None:
    named = set(get_type_hints(GenerateOptions))
    assert named == set(SamplingConfig.model_fields) | set(RENAMED_OPTIONS) | set(IGNORED_OPTIONS)


def test_what_has_no_effect_is_said(model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    model.generate("a", max_new_tokens=1, top_k=5, length_penalty=2.0)
    said = capsys.readouterr().err
    assert "top_k has no effect without do_sample" in said
    assert "length_penalty has no effect without num_beams" in said
    model.generate("a", max_new_tokens=1, top_k=5, num_beams=2)
    assert capsys.readouterr().err == ""


WRONG: list[tuple[dict[str, Any], type[AscendSpeedError], str]] = [
    ({"temprature": 0.5}, ConfigError, "no option temprature; did you mean temperature"),
    ({"max_length": 5, "max_new_tokens": 5}, ConfigError, "give one"),
    ({"max_length": 2}, AscendSpeedError, "leaves none of max_length=2"),
    ({"stop": ""}, ConfigError, "empty text"),
    ({"num_return_sequences": 2}, ConfigError, "same greedy text each time"),
    ({"num_return_sequences": 3, "num_beams": 2}, ConfigError, "more than num_beams=2"),
    ({"ignore_eos": True, "eos_token_ids": [3]}, ConfigError, "contradict"),
    ({"repetition_penalty": 0}, ConfigError, "repetition_penalty=0"),
    ({"stream": True, "num_beams": 2}, ConfigError, "give one prompt, and no beams"),
    ({"max_new_tokens": 64}, AscendSpeedError, "more than max_position_embeddings=64"),
]


@pytest.mark.parametrize(("options", "error", "complaint"), WRONG)
def test_bad_options(
    model: LanguageModel, options: dict[str, Any], error: type[AscendSpeedError], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        model.generate("the year", **options)
