"""The families that are known: those of this package, and those that other packages add.

Other packages add theirs under the entry-point group `ascendspeed_core.families`; each entry names a `Family`.
"""

from collections.abc import Mapping
from importlib import metadata
from types import MappingProxyType

from ascendspeed_core.models.families.aquila import AQUILA
from ascendspeed_core.models.families.baichuan import BAICHUAN
from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.bloom import BLOOM
from ascendspeed_core.models.families.cohere import COHERE, COHERE2
from ascendspeed_core.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from ascendspeed_core.models.families.gemma import GEMMA2, GEMMA3
from ascendspeed_core.models.families.glm import GLM, GLM4, GLM4_MOE
from ascendspeed_core.models.families.gpt_oss import GPT_OSS
from ascendspeed_core.models.families.granite import GRANITE, MINICPM, SMOLLM3
from ascendspeed_core.models.families.internlm import INTERNLM, INTERNLM2, INTERNLM3
from ascendspeed_core.models.families.llama import LLAMA
from ascendspeed_core.models.families.mistral import MISTRAL
from ascendspeed_core.models.families.mixtral import MIXTRAL
from ascendspeed_core.models.families.olmo import OLMO2, OLMO3
from ascendspeed_core.models.families.phi import PHI3
from ascendspeed_core.models.families.qwen import QWEN2, QWEN3
from ascendspeed_core.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from ascendspeed_core.models.families.stablelm import NEMOTRON, STABLELM
from ascendspeed_data.errors import AscendSpeedError, did_you_mean

ENTRY_POINTS = "ascendspeed_core.families"

_DENSE_OF_TODAY = (
    INTERNLM2, INTERNLM3, GEMMA2, GEMMA3, PHI3, OLMO2, OLMO3, GLM, GLM4, GRANITE, SMOLLM3, MINICPM, COHERE, COHERE2,
    STABLELM, NEMOTRON, DEEPSEEK_V2, DEEPSEEK_V3,
)  # fmt: skip

FAMILIES = MappingProxyType(
    {
        family.name: family
        for family in (
            *(LLAMA, MISTRAL, QWEN2, QWEN3, INTERNLM, AQUILA, BAICHUAN, BLOOM),
            *_DENSE_OF_TODAY,
            *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, GLM4_MOE, GPT_OSS),
        )
    }
)
"""Families of this package by name."""


def known_families() -> Mapping[str, Family]:
    """Return all families by name, those of installed packages included.

    Raises:
        AscendSpeedError: an installed one takes a name or an architecture that another has.
    """
    families = dict(FAMILIES)
    for point in sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        family: Family = point.load()
        taken = {name for other in families.values() for name in other.architectures}
        double = taken.intersection(family.architectures) or {family.name}.intersection(families)
        if double:
            raise AscendSpeedError(
                f"{point.value} takes {', '.join(sorted(double))}, which another family has; uninstall "
                f"{point.dist.name if point.dist else point.value} or rename it there"
            )
        families[family.name] = family
    return families


def find_family(name: str) -> Family:
    """Return the family of that name, or raise `AscendSpeedError`."""
    if name in FAMILIES:
        return FAMILIES[name]
    families = known_families()
    if name not in families:
        raise AscendSpeedError(
            f"family={name} is unknown; known are {', '.join(families)}{did_you_mean(name, families)}"
        )
    return families[name]
