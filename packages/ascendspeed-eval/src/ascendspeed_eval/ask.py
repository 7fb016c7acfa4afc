"""Ask a model for the answers of samples: several in one call, or each as soon as it is answered."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.evaluation import Evaluation
from ascendspeed_eval.model import (
    ConcurrentModel,
    EvaluatedModel,
    GenerateRequest,
    GenerateResult,
    LoglikelihoodRequest,
    LoglikelihoodResult,
    Request,
    RequestFailure,
    Result,
)
from ascendspeed_eval.tasks.samples import Sample

SAMPLES_PER_CALL = 64

Results = list[LoglikelihoodResult | GenerateResult]


def ask(
    evaluation: Evaluation, model: EvaluatedModel, samples: Sequence[Sample]
) -> Iterator[list[tuple[Sample, Results | RequestFailure]]]:
    """Yield samples with their results, or why they have none, as soon as they are there.

    A concurrent model gives one sample after the other, in any order; any other model is asked for
    `SAMPLES_PER_CALL` samples in one call.
    """
    groups = [
        list(evaluation.task.requests(one, evaluation.variant, evaluation.generation)) for one in samples
    ]
    if isinstance(model, ConcurrentModel):
        for number, results in model.answer_each(groups):
            yield [(samples[number], _checked(groups[number], results))]
        return
    for start in range(0, len(samples), SAMPLES_PER_CALL):
        part = slice(start, start + SAMPLES_PER_CALL)
        found = _call(model, groups[part])
        yield [(sample, _checked(*one)) for sample, one in zip(samples[part], found, strict=True)]


def _call(
    model: EvaluatedModel, groups: Sequence[Sequence[Request]]
) -> list[tuple[Sequence[Request], list[Result]]]:
    """Answer several samples; their requests of one kind go into one call."""
    asked = [(number, one) for number, group in enumerate(groups) for one in group]
    scored = [(number, one) for number, one in asked if isinstance(one, LoglikelihoodRequest)]
    continued = [(number, one) for number, one in asked if isinstance(one, GenerateRequest)]
    found: list[list[Result]] = [[] for _ in groups]
    if scored:
        for (number, _), score in zip(scored, model.loglikelihood([one for _, one in scored]), strict=True):
            found[number].append(score)
    if continued:
        for (number, _), text in zip(continued, model.generate([one for _, one in continued]), strict=True):
            found[number].append(text)
    return list(zip(groups, found, strict=True))


def _checked(requests: Sequence[Request], results: Sequence[Result]) -> Results | RequestFailure:
    """Return the results of a sample; the failure if there is one, also where a number is not finite."""
    whole: Results = []
    for number, found in enumerate(results):
        # Backends of other packages have result classes of their own, of the same shape.
        one: Any = found
        if hasattr(one, "reason"):
            return RequestFailure(str(one.reason))
        if hasattr(one, "logprob"):
            if not math.isfinite(one.logprob):
                asked = requests[number]
                choice = asked.continuation if isinstance(asked, LoglikelihoodRequest) else ""
                return RequestFailure(
                    f"the log-probability of {choice!r} is {one.logprob}, which is not finite"
                )
            whole.append(LoglikelihoodResult(one.logprob, one.is_greedy, one.truncated_tokens))
        else:
            reasoning = getattr(one, "reasoning", "")
            whole.append(GenerateResult(one.text, one.finish_reason, one.truncated_tokens, reasoning))
    if len(whole) != len(requests):
        raise EvaluationError(f"a backend gave {len(whole)} results to {len(requests)} requests; correct it")
    return whole
