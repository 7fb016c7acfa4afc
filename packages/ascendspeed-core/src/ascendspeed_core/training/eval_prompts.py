"""Complete fixed prompts while the model is trained.

This package trains and does not generate. A package that generates registers a `ContinueTexts` under the entry-point
group `ascendspeed_core.continue_texts`; ascendspeed-infer does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from ascendspeed_core.config.eval_prompts import EvalPromptsConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, ConfigError, DataError
from ascendspeed_data.files import write_durably
from ascendspeed_data.small_files import parse_json, read_json_lines, read_text
from ascendspeed_data.tokenizer import load_tokenizer

ENTRY_POINTS = "ascendspeed_core.continue_texts"
SAMPLES_FILE = "samples.jsonl"


class ContinueTexts(Protocol):
    """Complete prompts greedily, with a model in the middle of a training run."""

    def __call__(
        self,
        model: Transformer,
        mesh: ParallelMesh,
        tokenizer: Path,
        prompts: Sequence[str],
        max_new_tokens: int,
    ) -> list[str]:
        """Return what follows each prompt; all ranks call it alike and get the same.

        Args:
            model: this rank's part; left as it was.
            mesh: of this rank; data-parallel ranks do the same work.
            tokenizer: folder of the tokenizer.
            prompts: at least one.
            max_new_tokens: of each completion, at most.
        """
        ...


@dataclass(frozen=True)
class EvalPromptsPlan:
    """The prompts of a run, checked.

    Attributes:
        prompts: texts.
        tokenizer: folder of the tokenizer.
        interval: steps between.
        max_new_tokens: of each prompt.
    """

    prompts: tuple[str, ...]
    tokenizer: Path
    interval: int
    max_new_tokens: int


def plan_eval_prompts(
    config: EvalPromptsConfig, model: ModelConfig, layout: Layout, tokenizer: Path | None
) -> EvalPromptsPlan | None:
    """Check that prompts can be completed, before anything starts; `None` when there are none.

    Args:
        config: options.
        model: the architecture.
        layout: of the run.
        tokenizer: folder of the tokenizer, if one is known.

    Raises:
        ConfigError: a layout under which a model cannot generate.
        AscendSpeedError: no package that generates, no tokenizer, no prompts, or one that is too long.
    """
    if config.eval_prompts is None or config.eval_generate_interval is None:
        return None
    _refuse_layout(layout)
    find_continue_texts()
    if tokenizer is None:
        raise AscendSpeedError(
            "eval_prompts are texts, and no tokenizer came with the weights; give --tokenizer-name-or-path"
        )
    prompts = read_prompts(config.eval_prompts)
    opened, limit = load_tokenizer(tokenizer), model.max_position_embeddings
    for number, prompt in enumerate(prompts, 1):
        length = len(opened.encode(prompt))
        if not length or length + config.eval_max_new_tokens > limit:
            raise DataError(
                f"{config.eval_prompts}: prompt {number} has {length} tokens, with eval_max_new_tokens="
                f"{config.eval_max_new_tokens} not between 1 and max_position_embeddings={limit}; shorten one of them"
            )
    return EvalPromptsPlan(prompts, tokenizer, config.eval_generate_interval, config.eval_max_new_tokens)


def _refuse_layout(layout: Layout) -> None:
    """Raise `ConfigError` where a layout cannot compute one new token at a time."""
    if layout.sequence_parallel or layout.cp > 1:
        name = "sequence_parallel=true" if layout.sequence_parallel else f"context_parallel_size={layout.cp}"
        raise ConfigError(
            f"eval_prompts with {name}: a text that grows by one token cannot be cut over devices; leave one out, or "
            "give the checkpoints to `asd-infer generate`"
        )
    if layout.zero_stage == 3:
        raise ConfigError(
            "eval_prompts with zero_stage=3: no device holds the weights that it would generate with; leave one out, "
            "or give the checkpoints to `asd-infer generate`"
        )


def find_continue_texts() -> ContinueTexts:
    """Return what the installed package offers.

    Raises:
        AscendSpeedError: none is installed, or several.
    """
    points = list(metadata.entry_points(group=ENTRY_POINTS))
    if not points:
        raise AscendSpeedError(
            "eval_prompts needs a package that generates text; install ascendspeed-infer (pip install "
            "ascendspeed-infer), or leave --eval-prompts out"
        )
    if len(points) > 1:
        raise AscendSpeedError(
            f"several packages offer to generate text: {', '.join(point.value for point in points)}; uninstall all but "
            "one"
        )
    found: ContinueTexts = points[0].load()
    return found


class _Completion(BaseModel):
    """One line of `samples.jsonl`."""

    model_config = ConfigDict(extra="allow")

    iteration: int
    prompt: str
    text: str


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a file; empty lines of plain text are left out.

    Raises:
        DataError: it is missing, holds none, or a line of JSON that is no text.
    """
    # Not splitlines, which also cuts at characters that belong to a text.
    text = read_text(path, f"eval_prompts={path}", "save it as UTF-8", option="--eval-prompts")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    given = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    prompts = [_prompt_of(path, *one) for one in given] if path.suffix == ".jsonl" else [x for _, x in given]
    if not prompts:
        raise DataError(f"eval_prompts={path} holds no prompt; write one per line")
    return tuple(prompts)


def _prompt_of(path: Path, number: int, line: str) -> str:
    value: Any = parse_json(line, object, f"{path}, line {number}", "correct it")
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise DataError(f"{path}, line {number} is neither a text nor an object with `prompt`, a text")
    return prompt


class EvalPromptsWriter:
    """Completes the prompts of a run, and keeps the completions.

    Args:
        plan: the prompts.
        model: this rank's part.
        mesh: of this rank.
        run_folder: where `samples.jsonl` is kept; `None` keeps it in the log alone.
        iteration: where the run goes on; later lines of an interrupted run are dropped, with a log line.
    """

    def __init__(
        self,
        plan: EvalPromptsPlan,
        model: Transformer,
        mesh: ParallelMesh,
        run_folder: Path | None,
        iteration: int,
    ) -> None:
        self.plan, self._model, self._mesh = plan, model, mesh
        self._continue = find_continue_texts()
        self._path = run_folder / SAMPLES_FILE if run_folder is not None and mesh.rank == 0 else None
        if self._path is not None and self._path.exists():
            self._drop_later(self._path, iteration)

    def _drop_later(self, path: Path, iteration: int) -> None:
        lines, is_cut = read_json_lines(
            path, _Completion, f"delete it, or give another --save: {path.parent}"
        )
        kept = [line for line in lines if line.iteration <= iteration]
        if len(kept) < len(lines) or is_cut:
            log(f"{path}: dropped {len(lines) - len(kept) + is_cut} lines past iteration {iteration}")
            write_durably(path, "".join(_json_line(line.model_dump()) for line in kept))

    def write(self, iteration: int) -> int:
        """Complete all prompts, write and log the completions, and return how many; all ranks call together."""
        plan = self.plan
        try:
            texts = self._continue(self._model, self._mesh, plan.tokenizer, plan.prompts, plan.max_new_tokens)
        except AscendSpeedError as error:
            raise AscendSpeedError(f"iteration {iteration}, --eval-prompts: {error}") from None
        records = [
            {"iteration": iteration, "prompt": prompt, "text": text}
            for prompt, text in zip(plan.prompts, texts, strict=True)
        ]
        if self._mesh.rank == 0:
            for record in records:
                log(f"sample at iteration {iteration}: {record['prompt']!r} -> {record['text']!r}")
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(map(_json_line, records))
        return len(records)


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
