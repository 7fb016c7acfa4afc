"""The backend of ascendspeed-eval that scores any checkpoint under any layout.

Importing this module imports no torch: `asd-eval run --help` lists its options.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

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


OPTIONS = (
    Option("load", str, "Checkpoint: a training run's folder or a Hugging Face folder."),
    Option("model_config_file", str, "Random weights of this Hugging Face config.json.", ("--model-config",)),
    Option("tokenizer_name_or_path", str, "Tokenizer folder, when the checkpoint came without one."),
    Option("tokenizer_type", str, "Kind of tokenizer; PretrainedFromHF is the only one."),
    Option("tokenizer_not_use_fast", bool, "Accepted for old scripts: ids are exact either way."),
    Option("device", str, "auto, npu, cuda or cpu."),
    Option("nproc_per_node", int, "Processes to start on this machine."),
    Option("tensor_model_parallel_size", int, "Devices that share every layer."),
    Option("pipeline_model_parallel_size", int, "Stages that the layers are cut into."),
    Option("dtype", str, "Format to compute in. [default: as stored]"),
    Option("fp16", bool, "Short for --dtype float16."),
    Option("bf16", bool, "Short for --dtype bfloat16."),
    Option("micro_batch_size", int, "Prompts computed at once. [default: 8]"),
    Option("seq_length", int, "Longest prompt in tokens. [default: the model's]"),
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
        from ascendspeed_infer.config import inference_layout

        config = _config(options)
        world_size = planned_world_size(config.launch.nproc_per_node)
        inference_layout(config.parallel, world_size)
        prepare_torch(config.launch.device)
        from ascendspeed_infer.commands.generate import check_source

        check_source(config)
        if world_size == 1 or is_worker():
            return False
        launch("ascendspeed_eval.cli", arguments, config.launch.nproc_per_node, config.launch.device)
        return True

    @contextmanager
    def open(self, options: Mapping[str, Any]) -> Iterator[Any]:
        """Load the model; the first process asks, the others serve it until it is done."""
        from ascendspeed_core.launch import process_group, worker_errors
        from ascendspeed_core.weights import open_source
        from ascendspeed_core.weights.fingerprint import fingerprint
        from ascendspeed_infer.language_model import LanguageModel, stored_dtype

        config = _config(options)
        scoring = {name: options.get(name, default) for name, default in SCORING.items()}
        with worker_errors(), process_group(config.launch.device) as (world, device):
            source = open_source(config.source, config.sampling.seed)
            asked = config.precision.dtype or config.precision.fp16 or config.precision.bf16
            dtype = config.precision.dtype_name if asked else stored_dtype(source)
            model = LanguageModel.from_source(
                source, config.tokenizer.tokenizer_name_or_path, device.kind, dtype, config.parallel
            )
            name = source.path.name if source.path else f"random weights, seed {config.sampling.seed}"
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
    """A model whose calls all processes take part in: the first hands each call to the others."""

    def __init__(
        self, model: "LanguageModel", name: str, fingerprint: str, scoring: Mapping[str, Any]
    ) -> None:
        self._model, self._name, self._fingerprint = model, name, fingerprint
        self._batch_size, self._max_tokens = int(scoring["micro_batch_size"]), scoring["seq_length"]

    def describe(self) -> Description:
        """Say which model this is."""
        model = self._model.model
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        details = {"backend": "ascendspeed", "dtype": dtype, "layout": str(self._model.mesh.layout)}
        return Description(self._name, model.config.num_parameters, self._fingerprint, details)

    def loglikelihood(self, requests: Sequence[Any]) -> Sequence[Any]:
        """Score continuations."""
        return list(self._share("loglikelihood", [(r.context, r.continuation) for r in requests]))

    def generate(self, requests: Sequence[Any]) -> Sequence[Any]:
        """Continue prompts."""
        texts = []
        for request in requests:
            (done,) = self._share("generate", request.prompt, request.max_new_tokens, tuple(request.stop))
            texts.append(Text(done.text, done.finish_reason))
        return texts

    def serve(self) -> None:
        """Take part in the first process's calls until it is done."""
        while (call := self._broadcast(None)) is not None:
            self._call(*call)

    def finish(self) -> None:
        """Let the other processes go."""
        self._broadcast(None)

    def _share(self, name: str, *arguments: Any) -> Any:
        self._broadcast((name, *arguments))
        return self._call(name, *arguments)

    def _call(self, name: str, *arguments: Any) -> Any:
        if name == "loglikelihood":
            return self._model.loglikelihood(arguments[0], self._batch_size, self._max_tokens)
        prompt, max_new_tokens, stop = arguments
        return self._model.generate(prompt, max_new_tokens=max_new_tokens, stop=stop)

    def _broadcast(self, call: Any) -> Any:
        """Send a call from the first process to all; `None` ends the service."""
        if self._model.mesh.mesh is None:
            return call
        import torch.distributed as dist

        box = [call]
        dist.broadcast_object_list(box, src=0, device=self._model.mesh.device.torch)
        return box[0]


def _config(options: Mapping[str, Any]) -> "GenerateConfig":
    from ascendspeed_core.config.load import load_config
    from ascendspeed_infer.config import GenerateConfig

    given = {name: value for name, value in options.items() if name not in SCORING}
    return load_config(GenerateConfig, None, given)


backend = AscendSpeedBackend()
