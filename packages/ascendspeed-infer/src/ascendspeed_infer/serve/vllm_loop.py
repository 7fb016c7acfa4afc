"""vLLM behind the server's door: its engine, stepped as this project's own is.

vLLM schedules, computes and draws. Stop texts, names of tokens and everything about HTTP are the server's, so they are
the same for both engines.
"""

import itertools
from collections import deque
from collections.abc import Mapping
from typing import Any

from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.engine.batch_invariant import PassShapes
from ascendspeed_infer.engine.llm_engine import RequestOutput, check_length
from ascendspeed_infer.engine.prompt_request import PromptRequest
from ascendspeed_infer.engine.scoring_request import ScoringRequest
from ascendspeed_infer.engine.sequence import Request, SamplingRequest, TokenOutput, TopLogProbs
from ascendspeed_infer.sampling import check_finite_logits
from ascendspeed_infer.vllm_engine import VllmEngine, sampling_arguments

ServedRequest = SamplingRequest | PromptRequest


class VllmLoop:
    """Runs requests on vLLM; see `EngineLoop`.

    Args:
        engine: with the model.
    """

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self._inbox: deque[tuple[str, ServedRequest | None, str | None]] = deque()
        self._running: dict[str, ServedRequest] = {}
        self._num_reported: dict[str, int] = {}
        self._counter = itertools.count()
        self.shapes = PassShapes()
        self.adapter_names: tuple[str, ...] = ()
        self.num_blocks = self.free_blocks = self.num_preemptions = 0
        """vLLM keeps its memory to itself."""

    @property
    def max_model_len(self) -> int:
        """See `EngineLoop`."""
        return self._engine.max_model_len

    @property
    def num_running(self) -> int:
        """See `EngineLoop`: those that vLLM has, waiting or not."""
        return len(self._running)

    def unique_name(self, kind: str) -> str:
        """See `EngineLoop`."""
        return f"{kind}-{next(self._counter)}"

    def add_request(
        self,
        request_id: str,
        request: Request | ScoringRequest,
        batch_invariant: bool = False,
        cache_salt: str | None = None,
        adapter: str | None = None,
    ) -> None:
        """See `EngineLoop`.

        Raises:
            AscendSpeedError: vLLM cannot do what is asked.
        """
        assert isinstance(request, SamplingRequest | PromptRequest)
        if isinstance(request, SamplingRequest):
            if request.constraint is not None:
                raise AscendSpeedError("engine=vllm is not held to forms of answers here; leave the form out")
            check_length(len(request.prompt_ids), request.max_new_tokens, self.max_model_len)
        self._params(request)
        self._inbox.append((request_id, request, cache_salt))

    def abort_request(self, request_id: str) -> None:
        """See `EngineLoop`."""
        self._inbox.append((request_id, None, None))

    def has_unfinished_requests(self) -> bool:
        """See `EngineLoop`."""
        return bool(self._inbox or self._running)

    def step(self) -> list[RequestOutput]:
        """See `EngineLoop`."""
        outputs: list[RequestOutput] = []
        while self._inbox:
            name, request, salt = self._inbox.popleft()
            if request is None:
                if self._running.pop(name, None) is not None:
                    self._engine.abort(name)
                continue
            try:
                self._engine.add(name, request.prompt_ids, self._params(request), salt)
                self._running[name], self._num_reported[name] = request, 0
            except AscendSpeedError as error:
                outputs.append(RequestOutput(name, is_finished=True, error=error))
        if self._running:
            for output in self._engine.step():
                request = self._running.get(output.request_id)
                if request is not None:
                    outputs += self._report(request, output)
        return outputs

    def _params(self, request: ServedRequest) -> dict[str, Any]:
        """Return arguments of `vllm.SamplingParams`."""
        if isinstance(request, PromptRequest):
            return {
                "max_tokens": 1,
                "temperature": 0.0,
                "detokenize": False,
                "prompt_logprobs": request.num_top,
            }
        settings = request.settings
        sampling = settings.sampling
        return sampling_arguments(settings) | {
            "logprobs": settings.num_top_log_probs,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "logit_bias": dict(sampling.logit_bias) or None,
        }

    def _report(self, request: ServedRequest, output: Any) -> list[RequestOutput]:
        """Give a request what vLLM computed for it."""
        name, error = output.request_id, None
        try:
            if isinstance(request, PromptRequest):
                if output.prompt_logprobs is None:
                    return []
                request.take_tokens(_prompt_tokens(request, output.prompt_logprobs))
            else:
                request.num_cached_tokens = output.num_cached_tokens or 0
                _take_tokens(request, output)
        except Exception as caught:  # noqa: BLE001 - ends this request, and no other
            error = request.error = caught
        new: tuple[TokenOutput, ...] = ()
        if isinstance(request, SamplingRequest):
            new = tuple(request.new_tokens(self._num_reported[name]))
            self._num_reported[name] += len(new)
        if request.is_finished:
            del self._running[name], self._num_reported[name]
            if not output.finished:
                self._engine.abort(name)
        elif output.finished:
            del self._running[name], self._num_reported[name]
            error = AscendSpeedError("vllm ended a text before its end; its own log says why")
        return [RequestOutput(name, new, request.is_finished or error is not None, error=error)]


def _take_tokens(request: SamplingRequest, output: Any) -> None:
    """Add new tokens to a text until it ends."""
    (text,) = output.outputs
    for token, table in zip(text.token_ids, text.logprobs, strict=True):
        if request.is_finished:
            return
        log_prob = float(table[token].logprob)
        check_finite_logits(log_prob)
        if request.settings.return_log_probs:
            request.log_probs.append(log_prob)
            request.top_log_probs.append(_top(table, request.settings.num_top_log_probs))
        request.take(int(token))


def _prompt_tokens(request: PromptRequest, tables: Any) -> list[TokenOutput]:
    found = []
    for token, table in zip(request.prompt_ids[1:], tables[1:], strict=True):
        log_prob = float(table[token].logprob)
        found.append(TokenOutput(token, log_prob, None, _top(table, request.num_top)))
    return found


def _top(table: Mapping[int, Any], count: int) -> TopLogProbs:
    """Return the likeliest tokens; vLLM adds the chosen one where it is not among them."""
    ordered = sorted(table.items(), key=lambda item: -item[1].logprob)[:count]
    return tuple((int(token), float(one.logprob)) for token, one in ordered)
