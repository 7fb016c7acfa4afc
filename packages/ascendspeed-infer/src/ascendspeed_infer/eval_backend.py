"""The backend of ascendspeed-eval that scores any checkpoint under any layout.

Importing this module imports no torch: `asd-eval run --help` lists its options.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError

if TYPE_CHECKING:
    from ascendspeed_infer.config import GenerateConfig
    from ascendspeed_infer.language_model import LanguageModel


@dataclass(frozen=True)
class Option:
    """An option of this backend; see `ascendspeed_eval.model.BackendOption`."""

    name: str
    type: type
    help: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """See `ascendspeed_eval.model.ModelDescription`."""

    name: str
    num_parameters: int | None
    fingerprint: str | None
    details: Mapping[str, str]


@dataclass(frozen=True)
class Text:
    """See `ascendspeed_eval.model.GenerateResult`."""

    text: str
    finish_reason: str
    truncated_tokens: int = 0


OPTIONS = (
    Option("load", str, "Checkpoint: a training run's folder or a Hugging Face folder."),
    Option("model_config_file", str, "Random weights of this Hugging Face config.json.", ("--model-config",)),
    Option(
        "lora_load",
        str,
        "Folder of a LoRA adapter in peft's format, merged into the weights.",
        ("--adapter",),
    ),
    Option("tokenizer_name_or_path", str, "Tokenizer folder, when the checkpoint came without one."),
    Option("tokenizer_type", str, "Kind of tokenizer; PretrainedFromHF is the only one."),
    Option("tokenizer_not_use_fast", bool, "Accepted for old scripts: ids are exact either way."),
    Option("device", str, "auto, npu, cuda or cpu."),
    Option("nproc_per_node", int, "Processes to start on this machine."),
    Option("tensor_model_parallel_size", int, "Devices that share every layer."),
    Option("pipeline_model_parallel_size", int, "Stages that the layers are cut into."),
    Option(
        "zero_stage",
        int,
        "Answer under DeepSpeed: with 3 each process keeps a share of the weights, and all compute together.",
    ),
    Option("deepspeed", bool, "Answer under DeepSpeed, as --deepspeed_config or --zero-stage says."),
    Option(
        "deepspeed_config", str, "DeepSpeed's JSON: its stage, and its bucket sizes.", ("--deepspeed_config",)
    ),
    Option("dtype", str, "Format to compute in. [default: as stored]"),
    Option(
        "weight_quantization",
        str,
        "none, or int8: matrices as integers with a scale for each row, part of the run's identity. [default: none]",
    ),
    Option("fp16", bool, "Short for --dtype float16."),
    Option("bf16", bool, "Short for --dtype bfloat16."),
    Option("micro_batch_size", int, "Prompts continued at once; changes no answer. [default: 8]"),
    Option(
        "seq_length",
        int,
        "Longest prompt and answer in tokens; what is beyond it is cut off and counted. [default: the protocol's, at "
        "most the model's]",
    ),
    Option("max_position_embeddings", int, "At most the model's own."),
    Option("num_layers", int, "Must equal the model's."),
    Option("hidden_size", int, "Must equal the model's."),
    Option("ffn_hidden_size", int, "Must equal the model's."),
    Option("num_attention_heads", int, "Must equal the model's."),
    Option("num_key_value_heads", int, "Must equal the model's.", ("--num-query-groups",)),
    Option("norm_epsilon", float, "Must equal the model's.", ("--layernorm-epsilon",)),
)
SCORING = MappingProxyType({"micro_batch_size": 8, "seq_length": None})
"""Options that are not those of `asd-infer generate`, with their defaults."""


class AscendSpeedBackend:
    """The entry point `ascendspeed`."""

    name = "ascendspeed"
    summary = "any checkpoint, on this machine's devices"
    options: Sequence[Option] = OPTIONS

    def claims(self, options: Mapping[str, Any]) -> bool:
        """Wanted when a model is named."""
        return "load" in options or "model_config_file" in options

    def launch(self, options: Mapping[str, Any], arguments: Sequence[str]) -> bool:
        """Check the options, and start the processes if there are to be several."""
        from ascendspeed_core.device import prepare_torch
        from ascendspeed_core.launch import is_worker, launch, planned_world_size
        from ascendspeed_infer.config import refuse_context_parallel

        config = _config(options)
        world_size = planned_world_size(config.launch.nproc_per_node)
        refuse_context_parallel(config.parallel)
        config.parallel.layout(world_size)
        prepare_torch(config.launch.device)
        from ascendspeed_infer.loading import check_source

        check_source(config)
        if world_size == 1 or is_worker():
            return False
        launch("ascendspeed_eval.cli", arguments, config.launch.nproc_per_node, config.launch.device)
        return True

    @contextmanager
    def open(self, options: Mapping[str, Any]) -> Iterator[Any]:
        """Load the model; the first process asks, the others serve it until it is done."""
        from ascendspeed_core.launch import process_group, worker_errors
        from ascendspeed_core.weights.fingerprint import fingerprint
        from ascendspeed_infer.language_model import LanguageModel
        from ascendspeed_infer.loading import open_model_source, wanted_dtype

        config = _config(options)
        scoring = {name: options.get(name, default) for name, default in SCORING.items()}
        with worker_errors(), process_group(config.launch.device) as (world, device):
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
            served = ServedModel(model, name, fingerprint(source), scoring)
            if world.rank != 0:
                served.serve()
                yield None
                return
            try:
                yield served
            finally:
                served.finish()


class ServedModel:
    """A model whose calls all processes take part in: the first hands each call to the others.

    Data-parallel copies each answer a share of the requests; processes that hold the weights together (ZeRO-3) all
    answer all.
    """

    def __init__(
        self, model: "LanguageModel", name: str, fingerprint: str, scoring: Mapping[str, Any]
    ) -> None:
        self._model, self._name, self._fingerprint = model, name, fingerprint
        self._batch_size, self._max_tokens = int(scoring["micro_batch_size"]), scoring["seq_length"]
        self._is_invariant = True
        try:
            model.tiles()
        except AscendSpeedError as error:
            self._is_invariant = False
            if model.mesh.rank == 0:
                log(f"{error}; until then other requests can change the last bits of a result")

    def describe(self) -> Description:
        """Say which model this is; how many devices share the requests out is left out, as it changes nothing."""
        from ascendspeed_core.models.int8 import has_int8_weights

        model, layout = self._model.model, self._model.mesh.layout
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        limit = model.config.max_position_embeddings
        details = {
            "backend": "ascendspeed",
            "dtype": dtype,
            "layout": f"tp{layout.tp} x pp{layout.pp}",
            "seq_length": str(min(self._max_tokens or limit, limit)),
            "tokenizer": self._model.tokenizer.fingerprint,
        }
        if has_int8_weights(model):
            details["weight_quantization"] = "int8"
        return Description(self._name, model.config.num_parameters, self._fingerprint, details)

    def loglikelihood(self, requests: Sequence[Any]) -> Sequence[Any]:
        """Score continuations."""
        return self._share("loglikelihood", [(r.context, r.continuation) for r in requests])

    def generate(self, requests: Sequence[Any]) -> Sequence[Any]:
        """Continue prompts."""
        asked = [(r.prompt, r.max_new_tokens, tuple(r.stop), r.temperature, r.seed) for r in requests]
        return self._share("generate", asked)

    def serve(self) -> None:
        """Take part in the first process's calls until it is done."""
        while (call := self._broadcast(None)) is not None:
            self._call(*call)

    def finish(self) -> None:
        """Let the other processes go."""
        self._broadcast(None)

    def _share(self, name: str, requests: list[Any]) -> list[Any]:
        self._broadcast((name, requests))
        return self._call(name, requests)

    def _call(self, name: str, requests: list[Any]) -> list[Any]:
        """Answer this process's share, and return the answers to all on the first process."""
        mesh = self._model.mesh
        answer = self._score if name == "loglikelihood" else self._continue
        if mesh.layout.dp == 1 or mesh.layout.zero_stage == 3:
            return answer(requests)
        shares = share_out(requests, mesh.layout.dp)
        answers = answer([requests[number] for number in shares[mesh.dp_rank]])
        from ascendspeed_core.parallel.mesh import gather_objects

        whole: dict[int, Any] = {}
        for rank, part in enumerate(gather_objects(answers, mesh, mesh.group("dp"))):
            whole |= dict(zip(shares[rank], part, strict=True))
        return [whole[number] for number in range(len(requests))]

    def _score(self, requests: list[Any]) -> list[Any]:
        from ascendspeed_infer.scoring import Pair

        pairs = [Pair(*request) for request in requests]
        return list(self._model.loglikelihood(pairs, self._max_tokens)) if pairs else []

    def _continue(self, requests: list[Any]) -> list[Text]:
        from ascendspeed_infer.requests import GenerationRequest

        limit = self._max_tokens or self._model.model.config.max_position_embeddings
        asked = [GenerationRequest(*request) for request in requests]
        texts = []
        for one, done in zip(
            asked,
            self._model.generate_together(asked, self._batch_size, limit, self._is_invariant),
            strict=True,
        ):
            cut = len(self._model.tokenizer.encode(one.prompt)) - len(done.prompt_token_ids)
            texts.append(Text(done.text, done.finish_reason, cut))
        return texts

    def _broadcast(self, call: Any) -> Any:
        """Send a call from the first process to all; `None` ends the service."""
        if self._model.mesh.mesh is None:
            return call
        import torch.distributed as dist

        box = [call]
        dist.broadcast_object_list(box, src=0, device=self._model.mesh.device.torch)
        return box[0]


def share_out(requests: Sequence[Any], parts: int) -> list[list[int]]:
    """Cut requests into shares of about equal work; those that begin alike, by their first item, stay together.

    Returns:
        Numbers of the requests of each share.
    """
    work = [len(request[0]) for request in requests]
    shares: list[list[int]] = [[] for _ in range(parts)]
    total, done, last = sum(work), 0, 0
    for number, request in enumerate(requests):
        same = number > 0 and requests[number - 1][0] == request[0]
        part = last if same else min(done * parts // max(total, 1), parts - 1)
        shares[part].append(number)
        done, last = done + work[number], part
    return shares


def _config(options: Mapping[str, Any]) -> "GenerateConfig":
    from ascendspeed_core.config.load import load_config
    from ascendspeed_infer.config import GenerateConfig

    given = {name: value for name, value in options.items() if name not in SCORING}
    return load_config(GenerateConfig, None, given)


backend = AscendSpeedBackend()
