"""Options of the backend: those of the configs, under the flags that scripts use."""

import subprocess
import sys

from ascendspeed_data.command_line.options import option_help, walk_fields
from ascendspeed_infer.config import EvalConfig
from ascendspeed_infer.eval_backend import backend
from support.commands import environment

FLAGS = {
    "load": (str, ()),
    "model_config_file": (str, ("--model-config",)),
    "orig_vocab_size": (int, ()),
    "lora_load": (str, ("--adapter",)),
    "tokenizer_name_or_path": (str, ()),
    "tokenizer_type": (str, ()),
    "tokenizer_not_use_fast": (bool, ()),
    "device": (str, ()),
    "nproc_per_node": (int, ()),
    "tensor_model_parallel_size": (int, ()),
    "pipeline_model_parallel_size": (int, ()),
    "expert_model_parallel_size": (int, ()),
    "expert_tensor_parallel_size": (int, ()),
    "zero_stage": (int, ()),
    "deepspeed": (bool, ()),
    "deepspeed_config": (str, ("--deepspeed_config",)),
    "dtype": (str, ()),
    "weight_quantization": (str, ()),
    "fp16": (bool, ()),
    "bf16": (bool, ()),
    "micro_batch_size": (int, ()),
    "seq_length": (int, ()),
    "max_position_embeddings": (int, ()),
    "num_layers": (int, ()),
    "hidden_size": (int, ()),
    "ffn_hidden_size": (int, ()),
    "num_attention_heads": (int, ()),
    "num_key_value_heads": (int, ("--num-query-groups",)),
    "norm_epsilon": (float, ("--layernorm-epsilon",)),
    "rotary_base": (float, ()),
}
"""Flags that scripts use."""


def test_flags_and_types() -> None:
    assert {option.name: (option.type, option.flags) for option in backend.options} == FLAGS


def test_help_is_that_of_the_config() -> None:
    fields = {name: field for name, field, _ in walk_fields(EvalConfig)}
    assert {option.name: option.help for option in backend.options} == {
        name: option_help(fields[name]) for name in FLAGS
    }


def test_listing_the_options_imports_no_torch() -> None:
    program = "import sys, ascendspeed_infer.eval_backend; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=environment(), check=False).returncode == 0
