"""HumanEval (Chen et al., 2021): programs that must pass tests and run in a sandbox."""

import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from ascendspeed_eval.errors import UsageError
from ascendspeed_eval.progress import log
from ascendspeed_eval.sandbox.levels import open_sandbox
from ascendspeed_eval.sandbox.run import ProgramUnderTest, Sandbox, SandboxLevel
from ascendspeed_eval.statistics import pass_at_k
from ascendspeed_eval.tasks.answer_marks import OWN_OPERATORS
from ascendspeed_eval.tasks.base import Task, TaskVariant
from ascendspeed_eval.tasks.code_answers import code_marks, read_code
from ascendspeed_eval.tasks.reading import find_files, not_empty, read_json_lines
from ascendspeed_eval.tasks.samples import Benchmark, GenerationSettings, Record, Sample, ScoredSample

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Texts that end an answer (Chen et al., 2021, section 2.1)."""

PASS_AT_K = (1, 10, 100)


class HumanEval(Task):
    """`HumanEval.jsonl.gz` as it comes."""

    name = "human_eval"
    version = 2
    summary = "programs that must pass tests"
    size = "164"
    format = "JSON lines (.jsonl or .jsonl.gz) with task_id, prompt, entry_point and test"
    runs_code = True
    reference_scores = (("LLaMA-7B", "2023 README, pass@1", 0.116),)
    variants = MappingProxyType(
        {
            "ascendspeed": TaskVariant(
                "ascendspeed",
                "with an instruction; of prompt and answer together the imports and functions "
                "up to the first line that is neither (the rule of the 2023 AscendSpeed), or the function that the "
                "answer itself defines, in a fence or not",
                "The definition and function description of the python function are as follows. Please complete the "
                "implementation of the python function.\n{prompt}",
                max_new_tokens=1024,
                seq_length=2048,
                main="pass@1",
            ),
            "lm-eval": TaskVariant(
                "lm-eval",
                "the text up to the next class, function, comment, if or print (the authors' rule, and "
                "humaneval of lm-evaluation-harness 0.4)",
                "{prompt}",
                max_new_tokens=1024,
                stop=STOP,
                main="pass@1",
            ),
        }
    )

    def __init__(self) -> None:
        self._sandbox: Sandbox | None = None

    def prepare(self, settings: GenerationSettings) -> None:
        """Open the sandbox, before the model is asked anything.

        Raises:
            UsageError: the user has not allowed code execution.
            EvaluationError: this machine cannot confine programs well enough.
        """
        self._open(settings)

    def _open(self, settings: GenerationSettings) -> Sandbox:
        if not settings.allow_code_execution:
            raise UsageError(
                f"{self.name} runs programs that the model wrote; allow it with --allow-code-execution"
            )
        if self._sandbox is None:
            self._sandbox = open_sandbox(allow_weak=settings.allow_weak_sandbox)
            if self._sandbox.level is not SandboxLevel.NAMESPACES:
                description = self._sandbox.level.description
                log(f"{self.name}: programs run in {description}; docs/sandbox.md says what this means")
        return self._sandbox

    def read(self, path: str) -> Benchmark:
        """Read one file or the files of a folder."""
        hint = f"human_eval reads {self.format}"
        files = find_files(path, ("*.jsonl", "*.jsonl.gz"), hint)
        keys = dict.fromkeys(("task_id", "prompt", "entry_point", "test"), str)
        records = [
            Record(fields["task_id"], "human_eval", fields, fields["entry_point"])
            for file in files
            for _, fields in read_json_lines(file, keys)
        ]
        not_empty(records, files, hint)
        return Benchmark(records, {}, files)

    def score_texts(
        self,
        sample: Sample,
        texts: Sequence[str],
        truncated_tokens: int,
        variant: TaskVariant,
        settings: GenerationSettings,
    ) -> ScoredSample:
        """Run each program against the tests.

        Raises:
            UsageError: the user has not allowed code execution.
            EvaluationError: the sandbox could not be built.
        """
        fields, sandbox = sample.record.fields, self._open(settings)
        outcomes = [sandbox.run(self.program(variant, fields, text)) for text in texts]
        right = sum(outcome.passed for outcome in outcomes)
        scores = {f"pass@{k}": pass_at_k(len(texts), right, k) for k in PASS_AT_K if k <= len(texts)}
        extracted: dict[str, Any] = {
            "outcomes": [outcome.reason for outcome in outcomes],
            "own_operations": [outcome.own_operations for outcome in outcomes],
            "protections": sorted({name for outcome in outcomes for name in outcome.protections}),
        }
        return ScoredSample(
            sample.record.id,
            sample.record.subset,
            sample.prompt,
            sample.record.target,
            scores,
            truncated_tokens,
            outputs=list(texts),
            extracted=extracted,
            marks=[
                *(mark for text in texts for mark in code_marks(text, fields["entry_point"])),
                *(OWN_OPERATORS for outcome in outcomes if outcome.passed and outcome.own_operations),
            ],
        )

    @staticmethod
    def program(variant: TaskVariant, fields: Any, text: str) -> ProgramUnderTest:
        """Return the answer as a program, and its tests."""
        prompt, header = fields["prompt"], ""
        if variant.name == "ascendspeed":
            header = "from typing import List\nimport math\n"
            answer = read_code(prompt, text, fields["entry_point"])
            program = header + (
                answer.code if answer.is_block else kept_lines(answer.code, fields["entry_point"])
            )
        else:
            program = prompt + text
        return ProgramUnderTest(program, header + prompt, fields["test"], fields["entry_point"])


def kept_lines(answer: str, entry_point: str) -> str:
    """Return imports and functions up to the first other line after the function wanted; the rule of 2023."""
    kept, seen = [], False
    for number, line in enumerate(answer.split("\n")):
        if (number == 0 and line.lower() == "python") or not line.strip():
            continue
        if line[0].isspace() or line.startswith(("from", "import")):
            kept.append(line)
        elif line.startswith("def"):
            # The program of 2023 split at spaces only, so it missed "def add(a, b)". The name alone is compared here.
            seen = seen or re.split(r"[\s(]+", line)[1] == entry_point
            kept.append(line)
        elif seen:
            break
    return "\n".join(kept) + "\n"
