"""Beam search finds transformers' texts and scores, with and without drawing, in every family and layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import open_weights
from ascendspeed_data.errors import ConfigError
from ascendspeed_infer.beams import BeamHypotheses, BeamSettings
from ascendspeed_infer.engine.llm_engine import LLMEngine
from ascendspeed_infer.engine.sequence import GenerationSettings
from ascendspeed_infer.generation import search_beams
from ascendspeed_infer.sampling import SamplingParams
from support.families import REFERENCES, logits_of
from support.processes import WorkerPool
from support.shared_data import STORIES, needs_shared_data

PROMPT = [5, 17, 99, 3, 41]
NEW = 12
Texts = list[tuple[list[int], float]]


class Searched(PreTrainedModel, GenerationMixin):
    """Any model under transformers' own beam search: it is run over the whole text for every token."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, model: torch.nn.Module, vocab_size: int) -> None:
        super().__init__(PretrainedConfig(vocab_size=vocab_size, is_decoder=True))
        self.model = model
        self.generation_config = GenerationConfig()

    def forward(self, input_ids: torch.Tensor, **more: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=logits_of(self.model, input_ids))

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **more: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


def theirs(model: torch.nn.Module, vocab_size: int, prompt: list[int], seed: int, **options: Any) -> Texts:
    """Ids and scores of transformers' beam search."""
    searched = Searched(model, vocab_size).eval()
    torch.manual_seed(seed)
    found: Any = searched.generate(
        torch.tensor([prompt]), pad_token_id=0, bos_token_id=1, use_cache=False, return_dict_in_generate=True,
        output_scores=True, max_new_tokens=NEW, **{"top_k": 0, **options},
    )  # fmt: skip
    texts = []
    for ids, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        new = ids[len(prompt) :]
        ends = [place for place, token in enumerate(new) if token in options["eos_token_id"]]
        texts.append((new[: ends[0] + 1] if ends else new, score))
    return texts


def ours(
    folder: str, layout: Layout, dtype: torch.dtype, prompt: list[int], seed: int, **options: Any
) -> Texts:
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, dtype).eval()
    of_draws = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    sampling = SamplingParams(seed=seed, **{key: value for key, value in options.items() if key in of_draws})
    of_beams = ("num_beams", "length_penalty", "early_stopping", "num_return_sequences")
    beams = BeamSettings(**{key: value for key, value in options.items() if key in of_beams})
    settings = GenerationSettings(NEW, sampling, tuple(options["eos_token_id"]), return_log_probs=True)
    found = search_beams(LLMEngine(model, mesh), prompt, settings, beams)
    for text in found:
        assert text.log_probs is not None
        assert len(text.log_probs) == len(text.token_ids)
        if not sampling.do_sample and sampling.repetition_penalty == 1:
            length = len(text.token_ids) ** beams.length_penalty
            assert text.score == pytest.approx(sum(text.log_probs) / length, abs=1e-5)
    return [(list(text.token_ids), text.score or 0.0) for text in found]


def check(found: Texts, want: Texts) -> None:
    assert [ids for ids, _ in found] == [ids for ids, _ in want]
    # Sums of up to 12 fp32 log-probabilities, in another order.
    assert [score for _, score in found] == pytest.approx([score for _, score in want], abs=2e-5)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"num_beams": 4, "num_return_sequences": 4},
    "two ends": {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": [7, 8]},
    "long texts": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    "short texts": {"num_beams": 3, "length_penalty": -1.0, "num_return_sequences": 2},
    "first finished": {"num_beams": 4, "early_stopping": True, "num_return_sequences": 4},
    "no repeats": {"num_beams": 4, "repetition_penalty": 1.7},
    "drawn": {"num_beams": 4, "do_sample": True, "num_return_sequences": 4},
    "drawn from few": {"num_beams": 3, "do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7},
}


@pytest.mark.parametrize("case", CASES)
def test_every_option(tmp_path: Path, case: str) -> None:
    """Texts end at several lengths, but where long ones are preferred."""
    reference = REFERENCES["LLaMA 2 70B"].save(tmp_path)
    options = {"eos_token_id": list(range(3, 125, 8))} | CASES[case]
    lengths: set[int] = set()
    for seed in range(4):
        prompt = [*PROMPT, seed]
        want = theirs(reference, 125, prompt, seed, **options)
        check(ours(str(tmp_path), Layout(), torch.float32, prompt, seed, **options), want)
        lengths |= {len(ids) for ids, _ in want}
    assert (lengths != {NEW}) == (case != "long texts")


@pytest.mark.parametrize("name", REFERENCES)
def test_every_family(tmp_path: Path, name: str) -> None:
    reference = REFERENCES[name].save(tmp_path)
    options = {"num_beams": 4, "num_return_sequences": 4, "eos_token_id": [3, 11, 19, 27, 35, 43]}
    want = theirs(reference, 125, PROMPT, 0, **options)
    check(ours(str(tmp_path), Layout(), torch.float32, PROMPT, 0, **options), want)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)], ids=str)
def test_every_layout(workers: WorkerPool, tmp_path: Path, layout: Layout) -> None:
    REFERENCES["Bloom"].save(tmp_path)
    options = {"num_beams": 4, "num_return_sequences": 4, "eos_token_id": [3, 11, 19, 27]}
    for more in ({}, {"do_sample": True, "top_k": 30}):
        arguments = (torch.float64, PROMPT, 3)
        want = ours(str(tmp_path), Layout(), *arguments, **options, **more)
        for found in workers.run(
            ours, layout.world_size, str(tmp_path), layout, *arguments, **options, **more
        ):
            check(found, want)


@needs_shared_data
@pytest.mark.parametrize("num_beams", [2, 5])
def test_trained_model(num_beams: int) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    options = {"num_beams": num_beams, "num_return_sequences": num_beams, "eos_token_id": [1, 2]}
    for prompt in ([1, 403, 407, 261, 378], [1, 410, 469, 347]):
        want = theirs(reference, 512, prompt, 0, **options)
        check(ours(str(STORIES), Layout(), torch.float32, prompt, 0, **options), want)


def test_all_texts_are_looked_at() -> None:
    """With as many beams as there are texts the search is exhaustive: the best of all is found."""
    steps = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
    beams = BeamHypotheses(
        BeamSettings(9, num_return_sequences=9), SamplingParams(), [0], 2, (), lambda _: False
    )
    for row in steps:
        beams.advance(row.expand(9, 3))
    found = {beam.ids: beam.score for beam in beams.best()}
    want = {(a, b): float(steps[0, a] + steps[1, b]) / 2 for a in range(3) for b in range(3)}
    assert found == pytest.approx(want, abs=1e-6)
    assert beams.best()[0].ids == (0, 2)


def test_a_stop_text_ends_a_beam() -> None:
    beams = BeamHypotheses(BeamSettings(2), SamplingParams(), [0], 5, (), lambda ids: ids[-1] == 1)
    beams.advance(torch.tensor([[0.1, 0.6, 0.3]]).log().expand(2, 3))
    assert [(beam.ids, beam.ended) for beam in beams.finished] == [((1,), True)]
    assert (1,) not in [beam.ids for beam in beams.running]


@pytest.mark.parametrize(("wrong", "complaint"), [
    ({"num_beams": 1}, "num_beams=1 is no beam search"),
    ({"num_beams": 2, "num_return_sequences": 3}, "is not in 1 to num_beams=2"),
])  # fmt: skip
def test_bad_settings(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        BeamSettings(**wrong)
