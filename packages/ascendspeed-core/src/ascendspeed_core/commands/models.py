"""`asd-core models`."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ascendspeed_data.errors import ConfigError, did_you_mean


def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Families or sizes to list, for example bloom llama2-7b. [default: all]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per model.")] = False,
    config: Annotated[
        bool, typer.Option("--config", help="Print the config.json of one size, for --model-config.")
    ] = False,
) -> None:
    """List families and sizes of models with their parameters, layers and memory.

    Memory is of the whole model, without activations: weights at 2 bytes a parameter (bf16); training state at 18
    (bf16 weights 2, fp32 gradients 4, fp32 master weights 4, AdamW's two moments 8), divided by tp and pp and, for 12
    of the 18 with --use-distributed-optimizer, by dp; keys and values per token of context at 2 x 2 bytes x layers x
    key-value heads x head size.
    """
    from ascendspeed_core.models.families.published import PublishedModel, published_models, table

    found = published_models()
    known = dict.fromkeys([*(model.family for model in found), *(model.name for model in found)])
    for name in names or ():
        if name not in known:
            raise ConfigError(f"{name} is no family or size that is known{did_you_mean(name, known)}")
    chosen: list[PublishedModel] = [
        model for model in found if not names or model.name in names or model.family in names
    ]
    if config:
        if len(chosen) != 1:
            raise ConfigError(f"--config prints one model, {len(chosen)} were chosen; name one size")
        print(json.dumps(_config_of(chosen[0].name), indent=2))
    elif as_json:
        for model in chosen:
            print(json.dumps(asdict(model)))
    else:
        print("\n".join(table(chosen)))


def _config_of(name: str) -> dict[str, Any]:
    from ascendspeed_core.models.families.published import published_size

    found = published_size(name)
    assert found is not None
    family, hf_config = found
    return family.write_config(family.read_config(hf_config))
