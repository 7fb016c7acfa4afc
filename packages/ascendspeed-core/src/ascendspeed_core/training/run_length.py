"""How long a run is, in steps and samples, where the length of its data decides it."""

from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.launch import announce
from ascendspeed_core.objectives.objective import Objective
from ascendspeed_core.optim.schedule import samples_of_run, with_epochs
from ascendspeed_data.errors import ConfigError


def with_all_epochs(config: PretrainConfig, kind: type[Objective], dp: int) -> PretrainConfig:
    """Return the config with the steps that `num_train_epochs` takes; as it is without."""
    epochs = config.training.num_train_epochs
    if epochs is None:
        return config
    samples = kind.samples_of_epochs(config.data, epochs)
    training, consumed = with_epochs(config.training, config.batch, dp, samples)
    beyond = f", the last of which begins another pass with {consumed - samples} of its samples"
    announce(
        f"num_train_epochs={epochs:g}: {samples:,} samples, {training.train_iters:,} iterations"
        f"{beyond if consumed > samples else ''}"
    )
    return config.model_copy(update={"training": training})


def with_all_held_out(config: PretrainConfig, kind: type[Objective], dp: int) -> PretrainConfig:
    """Return the config with as many batches of an evaluation as the held-out data fills, if it is to be measured."""
    if not config.evaluation.measures_all or not config.data.words(1):
        return config
    samples = kind.held_out_samples(config.data)
    if not samples:
        raise ConfigError(
            f"eval_interval={config.evaluation.eval_interval}: {config.data.describe_split(1)} leaves nothing to "
            "measure; give --split 90,10,0 or --valid-data-path, or leave --eval-interval out"
        )
    size = config.batch.resolve_global_batch_size(dp)
    batches = max(samples // size, 1)
    announce(
        f"eval_interval without eval_iters: each evaluation takes all {samples:,} held-out samples, "
        f"--eval-iters {batches}"
        + (f"; the last {samples % size} are left out" if samples > size and samples % size else "")
    )
    evaluation = config.evaluation.model_copy(update={"eval_iters": batches})
    return config.model_copy(update={"evaluation": evaluation})


def num_samples(config: PretrainConfig, dp: int) -> tuple[int, int, int]:
    """Return how many samples a run trains on, measures, and tests with at its end."""
    batch, evaluation = config.batch, config.evaluation
    of_one = evaluation.eval_iters * batch.resolve_global_batch_size(dp)
    evaluations = config.training.train_iters // evaluation.eval_interval + 1
    held_out = evaluations * of_one if config.data.words(1) else 0
    # The third share of --split is left alone; test data of its own is measured once.
    tested = of_one if config.data.test_data_path else 0
    return samples_of_run(config.training, batch, dp), held_out, tested
