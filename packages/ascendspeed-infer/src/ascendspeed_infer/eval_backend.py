"""The backend of ascendspeed-eval that scores any checkpoint under any layout.

Importing this module imports no torch: `asd-eval run --help` lists its options.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ascendspeed_core.config.load import load_config
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.options import further_flags, option_help, plain_type, walk_fields
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.config import (
    EvalConfig,
    ScoringConfig,
    refuse_context_parallel,
    refuse_spread_replicas,
)

if TYPE_CHECKING:
    from ascendspeed_core.weights import WeightSource
    from ascendspeed_infer.chat_prompts import ChatPrompts
    from ascendspeed_infer.engine.control_channel import ControlChannel
    from ascendspeed_infer.language_model import LanguageModel


@dataclass(frozen=True)
class BackendOption:
    """An option of this backend; see `ascendspeed_eval.model.BackendOption`."""

    name: str
    type: type
    help: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelDescription:
    """See `ascendspeed_eval.model.ModelDescription`."""

    name: str
    num_parameters: int | None
    fingerprint: str | None
    details: Mapping[str, str]
    location: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerateResult:
    """See `ascendspeed_eval.model.GenerateResult`."""

    text: str
    finish_reason: str
    truncated_tokens: int = 0
    reasoning: str = ""


@dataclass(frozen=True)
class RequestFailure:
    """See `ascendspeed_eval.model.RequestFailure`."""

    reason: str


SECTIONS_OF_THE_TASK = ("[engine]", "[sampling]")
"""Sections of the config that the benchmark's protocol decides, or that only generation has."""
ALWAYS_MERGED = "merge_adapter"
"""Adapters are merged, so that a result does not depend on how they are computed."""


def backend_options() -> tuple[BackendOption, ...]:
    """Return an option for each field of the config."""
    return tuple(
        BackendOption(name, plain_type(field), option_help(field), tuple(further_flags(field)))
        for name, field, section in walk_fields(EvalConfig)
        if section not in SECTIONS_OF_THE_TASK and name != ALWAYS_MERGED
    )


class AscendSpeedBackend:
    """The entry point `ascendspeed`."""

    name = "ascendspeed"
    summary = "any checkpoint, on this machine's devices"
    options: Sequence[BackendOption] = backend_options()

    def claims(self, options: Mapping[str, Any]) -> bool:
        """Wanted when a model is named."""
        return "load" in options or "model_config_file" in options

    def launch(self, options: Mapping[str, Any], arguments: Sequence[str]) -> bool:
        """Check the options, and start the processes if there are to be several."""
        from ascendspeed_core.device import prepare_torch
        from ascendspeed_core.launch import is_worker, launch, planned_world_size

        config = load_config(EvalConfig, None, dict(options))
        world_size = planned_world_size(config.launch.nproc_per_node)
        refuse_context_parallel(config.parallel)
        refuse_spread_replicas(config.parallel.layout(world_size))
        prepare_torch(config.launch.device)
        from ascendspeed_infer.loading import check_source

        check_source(config)
        if world_size == 1 or is_worker():
            return False
        launch("ascendspeed_eval.cli", arguments, config.launch.nproc_per_node, config.launch.device)
        return True

    @contextmanager
    def open(self, options: Mapping[str, Any]) -> Iterator[Any]:
        """Load the model.

        The first rank of each data-parallel replica leads the ranks that share its weights; rank 0 gives the leaders
        their shares of the requests. A rank that only took part yields `None` once all is done.
        """
        from ascendspeed_core.launch import process_group, worker_errors
        from ascendspeed_core.weights.fingerprint import fingerprint
        from ascendspeed_infer.language_model import LanguageModel
        from ascendspeed_infer.loading import open_model_source, wanted_dtype

        config = load_config(EvalConfig, None, dict(options))
        is_zero = config.parallel.resolved_zero_stage() is not None
        with worker_errors(), process_group(config.launch.device, even_alone=is_zero) as (world, device):
            source = open_model_source(config)
            model = LanguageModel.from_source(
                source,
                config.tokenizer.tokenizer_name_or_path,
                device.kind,
                wanted_dtype(config, source),
                config.parallel,
                data_parallel=True,
                weight_quantization=config.precision.weight_quantization,
            )
            adapter = f" with {config.adapter.lora_load.name}" if config.adapter.lora_load else ""
            name = (
                source.path.name + adapter if source.path else f"random weights, seed {config.sampling.seed}"
            )
            layout = model.mesh.layout
            # Ranks that hold the weights together (ZeRO-3) run every pass together.
            has_replicas = layout.dp > 1 and layout.zero_stage != 3
            leaders = channel_of_leaders(model) if has_replicas else None
            with model.lead_or_follow(each_replica=has_replicas) as leads:
                if not leads:
                    yield None
                    return
                served = ServedModel(model, source, name, fingerprint(source), config.scoring, leaders)
                if world.rank != 0:
                    served.serve_shares()
                    yield None
                    return
                try:
                    yield served
                finally:
                    served.finish()


def channel_of_leaders(model: "LanguageModel") -> "ControlChannel | None":
    """Return the channel from rank 0 to the first rank of each other replica; all ranks call together."""
    from ascendspeed_infer.engine.control_channel import open_channel

    assert model.mesh.mesh is not None
    return open_channel([model.mesh.mesh.mesh[0, :, 0, 0].tolist()])


class ServedModel:
    """Compute a benchmark's requests; data-parallel replicas each compute a share of them.

    Args:
        model: on the first rank of a replica.
        source: of its weights; says how conversations are laid out.
        name: for the report.
        fingerprint: digest of the weights.
        scoring: batch size and longest text.
        leaders: the channel among the replicas' first ranks, if there are several.
    """

    def __init__(
        self,
        model: "LanguageModel",
        source: "WeightSource",
        name: str,
        fingerprint: str,
        scoring: ScoringConfig,
        leaders: "ControlChannel | None" = None,
    ) -> None:
        self._model, self._name, self._fingerprint = model, name, fingerprint
        self._batch_size, self._max_tokens = scoring.micro_batch_size, scoring.seq_length
        self._leaders, self._source = leaders, source
        self._chat: ChatPrompts | None = None
        self._is_batch_invariant = True
        try:
            model.check_batch_invariance()
        except AscendSpeedError as error:
            self._is_batch_invariant = False
            if model.mesh.rank == 0:
                log(f"{error}; until then other requests can change the last bits of a result")

    def describe(self) -> ModelDescription:
        """Say which model this is; the number of replicas is left out, as it changes nothing."""
        from ascendspeed_core.models.int8 import has_int8_weights

        model, layout = self._model.model, self._model.mesh.layout
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        limit = self._model.llm_engine.max_model_len
        details = {
            "backend": "ascendspeed",
            "dtype": dtype,
            "layout": f"tp{layout.tp} x pp{layout.pp}",
            "seq_length": str(min(self._max_tokens or limit, limit)),
            "tokenizer": self._model.tokenizer.fingerprint,
        }
        if has_int8_weights(model):
            details["weight_quantization"] = "int8"
        if self._chat is not None:
            details |= self._chat.details()
        return ModelDescription(self._name, model.config.num_parameters, self._fingerprint, details)

    def loglikelihood(self, requests: Sequence[Any]) -> Sequence[Any]:
        """Score continuations."""
        if self._chat is not None:
            pairs = self._chat.pairs([(r.messages, r.continuation) for r in requests])
            return self._share("loglikelihood", [(one.context, one.continuation, one.text) for one in pairs])
        return self._share("loglikelihood", [(r.context, r.continuation) for r in requests])

    def generate(self, requests: Sequence[Any]) -> Sequence[Any]:
        """Continue prompts."""
        chat = self._chat
        ends = () if chat is None else chat.end_ids
        prompts = [r.prompt if chat is None else chat.ids(r.messages) for r in requests]
        plain = [
            (prompt, r.max_new_tokens, tuple(r.stop), r.temperature, r.seed, ends)
            for prompt, r in zip(prompts, requests, strict=True)
        ]
        return self._share("generate", plain)

    def start_chat(self, template_values: Mapping[str, Any], day: str | None) -> None:
        """Get ready to answer conversations, in the layout that a chat with this model has.

        Raises:
            AscendSpeedError: there is no chat template, or it does not read a value.
        """
        from ascendspeed_infer.chat import choose_layout
        from ascendspeed_infer.chat_prompts import ChatPrompts, values_of

        values = values_of(template_values, day)
        self._model.tokenizer.template_values = values
        layout = choose_layout(self._source, self._model.tokenizer, None)
        self._chat = ChatPrompts(layout, values)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, Sequence[Mapping[str, str]]]:
        """Return a conversation up to the answer, and the messages that it shows."""
        assert self._chat is not None
        return self._chat.render(messages)

    def serve_shares(self) -> None:
        """Compute this replica's share of what rank 0 is asked, until it is done."""
        assert self._leaders is not None
        while (call := self._leaders.receive()) is not None:
            self._compute_share(*call)

    def finish(self) -> None:
        """Let the leaders of the other replicas go."""
        if self._leaders is not None:
            self._leaders.send(None)

    def _share(self, method: str, requests: list[Any]) -> list[Any]:
        if self._leaders is None:
            return self._compute(method, requests)
        self._leaders.send((method, requests))
        return self._compute_share(method, requests)

    def _compute_share(self, method: str, requests: list[Any]) -> list[Any]:
        """Compute this replica's share, and return the results of all."""
        from ascendspeed_core.parallel.mesh import gather_objects

        mesh = self._model.mesh
        shares = split_by_work(requests, mesh.layout.dp)
        results = self._compute(method, [requests[number] for number in shares[mesh.dp_rank]])
        whole: dict[int, Any] = {}
        for rank, part in enumerate(gather_objects(results, mesh, mesh.group("dp"))):
            whole |= dict(zip(shares[rank], part, strict=True))
        return [whole[number] for number in range(len(requests))]

    def _compute(self, method: str, requests: list[Any]) -> list[Any]:
        return self._score(requests) if method == "loglikelihood" else self._continue(requests)

    def _score(self, requests: list[Any]) -> list[Any]:
        # What cannot be scored fails its sample alone; so do log-likelihoods that are not finite, in asd-eval.
        from ascendspeed_infer.scoring import IdPair, TextPair

        pairs = [IdPair(*one) if len(one) == 3 else TextPair(*one) for one in requests]
        found = self._model.loglikelihood_each(pairs, self._max_tokens)
        return [RequestFailure(str(one)) if isinstance(one, AscendSpeedError) else one for one in found]

    def _continue(self, requests: list[Any]) -> list[GenerateResult | RequestFailure]:
        from ascendspeed_infer.requests import GenerationRequest

        limit = self._max_tokens or self._model.llm_engine.max_model_len
        prompts = [GenerationRequest(*request) for request in requests]
        completions = self._model.generate_each(prompts, self._batch_size, limit, self._is_batch_invariant)
        results: list[GenerateResult | RequestFailure] = []
        for one, done in zip(prompts, completions, strict=True):
            if isinstance(done, AscendSpeedError):
                results.append(RequestFailure(str(done)))
                continue
            cut = len(one.ids(self._model.tokenizer)) - len(done.prompt_token_ids)
            results.append(GenerateResult(done.text, done.finish_reason, cut))
        return results


def split_by_work(requests: Sequence[Any], num_parts: int) -> list[list[int]]:
    """Cut requests into shares of about equal work; neighbours with the same first item stay together.

    Returns:
        Numbers of the requests of each share.
    """
    work = [len(request[0]) for request in requests]
    shares: list[list[int]] = [[] for _ in range(num_parts)]
    total, done, last = sum(work), 0, 0
    for number, request in enumerate(requests):
        same = number > 0 and requests[number - 1][0] == request[0]
        part = last if same else min(done * num_parts // max(total, 1), num_parts - 1)
        shares[part].append(number)
        done, last = done + work[number], part
    return shares


backend = AscendSpeedBackend()
