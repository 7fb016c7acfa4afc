"""What watches a run: the watchdog, the profiler, the share of the device that is used, and TensorBoard."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.observability.mfu import model_flops_utilization, training_flops_per_token
from ascendspeed_core.observability.watchdog import Watchdog
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import AscendSpeedError, ConfigError

PROFILES = "profiles"
"""Folder of a run that holds its traces."""


def check_monitor(config: PretrainConfig, world_size: int) -> None:
    """Refuse what cannot be watched, before anything starts.

    Raises:
        ConfigError: the profiler has no folder, or no such process.
        AscendSpeedError: TensorBoard is not installed.
    """
    monitor = config.monitor
    if monitor.profile_steps and config.checkpoint.save is None:
        raise ConfigError("profile_steps needs --save DIR, where the trace goes")
    missing = [rank for rank in monitor.profile_ranks if not 0 <= rank < world_size]
    if monitor.profile_steps and missing:
        raise ConfigError(
            f"profile_ranks={missing[0]} is none of the {world_size} processes; choose from 0 to {world_size - 1}"
        )
    if monitor.profile_steps and monitor.profile_steps[1] > config.training.train_iters:
        raise ConfigError(
            f"profile_steps={monitor.profile_steps[0]} {monitor.profile_steps[1]} ends after the last iteration, "
            f"{config.training.train_iters}; choose earlier ones"
        )
    if monitor.tensorboard_dir is not None and importlib.util.find_spec("tensorboard") is None:
        raise AscendSpeedError(
            f"tensorboard_dir={monitor.tensorboard_dir} needs the package tensorboard: pip install "
            '"ascendspeed-core[tensorboard]", or leave it out (metrics.jsonl has the same figures)'
        )


class Monitor:
    """Watches one run on this rank; all ranks construct it alike.

    Args:
        config: of the run, checked.
        model: this rank's part.
        mesh: of this rank.
        first_iteration: where the run starts; TensorBoard drops later points of an interrupted run.
        log: called with the lines of the log.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: Transformer,
        mesh: ParallelMesh,
        first_iteration: int,
        log: Callable[[str], None],
    ) -> None:
        self._config, self._mesh, self._log = config.monitor, mesh, log
        self._folder = config.checkpoint.save
        self._flops_per_token = training_flops_per_token(model.config, config.data.seq_length)
        self._peak_flops = self._peak(config.precision.dtype_name)
        self._profiler: Any = None
        self._board: Any = None
        if self._config.tensorboard_dir is not None and mesh.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._config.tensorboard_dir), purge_step=first_iteration + 1)
        timeout = self._config.hang_timeout_seconds
        self._watchdog = Watchdog(mesh, timeout, model) if timeout else None

    def _peak(self, dtype_name: str) -> float | None:
        device = self._mesh.device
        if self._config.peak_tflops is not None:
            peak, source = self._config.peak_tflops * 1e12, "--peak-tflops"
        else:
            known = device.peak_flops(dtype_name)
            if known is None:
                if device.kind != "cpu":
                    self._log(
                        f"MFU: the peak of {device.name} in {dtype_name} is not known; give --peak-tflops to see it"
                    )
                return None
            peak, source = known, f"{device.name}, dense {dtype_name}"
        self._log(
            f"MFU: {self._flops_per_token:.4g} operations per token, peak {peak / 1e12:g} TFLOP/s ({source}) x "
            f"{self._mesh.layout.world_size} devices"
        )
        return peak

    @contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """Watch, and profile where that was asked for, what one iteration does."""
        self._start_profile(iteration)
        with self.watching(iteration, "step"):
            yield
        self._end_profile(iteration)

    @contextmanager
    def watching(self, iteration: int, what: str) -> Iterator[None]:
        """Expect progress inside."""
        if self._watchdog is None:
            yield
            return
        with self._watchdog.watching(iteration, what):
            yield

    def metrics(self, tokens_per_second: float) -> dict[str, float]:
        """Return what a record of an iteration holds besides: the share of the devices' peak, where it is known."""
        if self._peak_flops is None:
            return {}
        devices = self._mesh.layout.world_size
        return {
            "mfu": model_flops_utilization(
                self._flops_per_token, tokens_per_second, devices, self._peak_flops
            )
        }

    def write(self, record: Mapping[str, Any]) -> None:
        """Give the figures of an iteration to TensorBoard."""
        if self._board is None:
            return
        for name, value in record.items():
            if name != "iteration" and value is not None:
                self._board.add_scalar(name, float(value), record["iteration"])
        self._board.flush()

    def close(self) -> None:
        """Stop watching."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._board is not None:
            self._board.close()

    def _start_profile(self, iteration: int) -> None:
        steps = self._config.profile_steps
        if steps and iteration == steps[0] and self._mesh.rank in self._config.profile_ranks:
            self._profiler = self._mesh.device.profiler()
            self._profiler.start()

    def _end_profile(self, iteration: int) -> None:
        if self._profiler is None or iteration != self._config.profile_steps[1]:
            return
        self._profiler.stop()
        assert self._folder is not None
        first, last = self._config.profile_steps
        path = self._folder / PROFILES / f"rank{self._mesh.rank}-iterations{first}-{last}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._export(path)
        self._profiler = None

    def _export(self, path: Path) -> None:
        scratch = path.with_name(f"incomplete-{path.name}")
        self._profiler.export_chrome_trace(str(scratch))
        scratch.replace(path)
        self._log(f"profile: {path} (open it in https://ui.perfetto.dev or chrome://tracing)")
