"""The objectives that there are, by name."""

from collections.abc import Mapping

from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.objectives.dpo import DirectPreferenceOptimization
from ascendspeed_core.objectives.next_token import NextToken
from ascendspeed_core.objectives.objective import Objective
from ascendspeed_core.objectives.sft import SupervisedFineTuning

OBJECTIVES: Mapping[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        NextToken,
        SupervisedFineTuning,
        DirectPreferenceOptimization,
    )
}


def objective_of(config: PretrainConfig) -> type[Objective]:
    """Return the objective that a config names."""
    return OBJECTIVES[config.objective]
