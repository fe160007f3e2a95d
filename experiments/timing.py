"""What is timed: the latency table and trained networks, as an inference process would run them.

The functions start that process, on the CPU also where an accelerator trains; see
`environment.configure_cpu`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.config import RunConfig
from experiments.workdir import RunFiles, load_table
from instanas_jax import convolution, environment, inference, latency_file, profiling
from instanas_jax.errors import InputError
from instanas_jax.latency import FIXED_PARTS, IN_NETWORK, LatencyTable
from instanas_jax.search_space import SupernetSpec
from instanas_jax.stage import Setting
from instanas_jax.train_state import TrainState

# Where a process lays a network's memory stays for its life, and follows from what it made before:
# by that alone a variant of CIFAR quick took 0.66 to 0.93 of MobileNetV2's time. So each process
# begins with another network.
PROCESSES = 3


def measure_table(spec: SupernetSpec, *, rounds: int, threads: int) -> LatencyTable:
    """A latency table of this computer's processor, with a progress bar."""
    return environment.in_inference_process(profile, spec, rounds, threads=threads)


def table_of_run(
    section: RunConfig,
    spec: SupernetSpec,
    files: RunFiles,
    *,
    path: str | None = None,
    allow_foreign: bool = False,
) -> LatencyTable:
    """The table that a run searches with: the one in its folder, else put there now.

    Args:
      path: of a table; None to measure one.
      allow_foreign: accept another device's.

    Raises:
      InputError: a table is damaged, or of something else, or not the one the run began with.
    """
    if files.latency_table.exists():
        go_on = "leave --latency_table out to go on with the run's own"
        if path and not _is_same(
            latency_file.load(path, spec, advice=go_on), load_table(files, spec)
        ):
            raise InputError(
                f"{files.path} holds a run by another latency table than --latency_table={path}: "
                f"{go_on}, or name another --workdir"
            )
    else:
        threads = section.inference_threads
        if path:
            table = given_table(section, spec, path, allow_foreign=allow_foreign)
        else:
            table = measure_table(spec, rounds=section.profile_rounds, threads=threads)
        latency_file.save(table, files.latency_table)
    # Times as they are rounded in the file. A run that resumes on another machine keeps its table,
    # and so its reward.
    return load_table(files, spec)


def given_table(
    section: RunConfig, spec: SupernetSpec, path: str, *, allow_foreign: bool
) -> LatencyTable:
    """A table that a run may begin with; InputError where it is of something else."""
    device = environment.describe_device(inference_threads=section.inference_threads)
    return latency_file.load(path, spec, device=device, allow_foreign=allow_foreign)


def _is_same(ours: LatencyTable, theirs: LatencyTable) -> bool:
    """Whether all times are the same, as files round them."""

    def times(table: LatencyTable) -> np.ndarray:
        parts = [
            *(table.fixed_ms[name] for name in FIXED_PARTS),
            *(table.in_network_ms[name] for name in IN_NETWORK),
        ]
        return np.concatenate([table.cells_ms.ravel(), table.settled_ms.ravel(), parts])

    return np.allclose(times(ours), times(theirs), rtol=0.0, atol=1e-6)


def profile(spec: SupernetSpec, rounds: int) -> LatencyTable:
    """As `measure_table`, in this process."""
    with tqdm(total=rounds, desc="latency table", unit="round", dynamic_ncols=True) as bar:
        return profiling.measure(spec, rounds=rounds, on_round=bar.update)


@dataclasses.dataclass(frozen=True, eq=False)
class Timed:
    """A network to time.

    Attributes:
      state: on the host.
      architecture: [L, O] that it runs; None: what its own controller decides.
    """

    setting: Setting
    state: TrainState
    architecture: np.ndarray | None = None


def time_networks(
    networks: dict[str, Timed],
    *,
    images: Iterable[np.ndarray],
    threads: int,
    on_process: Callable[[], object] = lambda: None,
) -> dict[str, np.ndarray]:
    """Milliseconds of every network on every image, one at a time, in turn.

    Args:
      images: uint8 [H, W, 3].
      threads: see `environment.configure_cpu`.
      on_process: called after each of the `PROCESSES`.

    Returns:
      For each name an array [number of images], each the median over some processes.
    """
    runs = []
    for first in range(PROCESSES):
        runs.append(
            environment.in_inference_process(
                _time_networks, networks, images, first, threads=threads
            )
        )
        on_process()
    return {name: np.median([run[name] for run in runs], axis=0) for name in networks}


def rotated(names: Iterable[str], first: int) -> list[str]:
    """The names in turn from place `first` on, so that in each of some processes another one is
    laid out first in memory."""
    names = list(names)
    place = first % len(names)
    return [*names[place:], *names[:place]]


def _time_networks(
    networks: dict[str, Timed], images: Iterable[np.ndarray], first: int
) -> dict[str, np.ndarray]:
    names = rotated(networks, first)
    # One after another: threads would lay them out by chance.
    predictors = [_make_predictor(networks[name]) for name in names]
    environment.release_memory()  # As who deploys one; what compiling left slows every call down.
    return inference.time_in_turn(dict(zip(names, predictors, strict=True)), images)


def _make_predictor(network: Timed) -> inference.Predict:
    setting, state = network.setting, network.state
    common: dict[str, Any] = {
        "supernet_variables": state.supernet,
        "mean": setting.mean,
        "std": setting.std,
        "lowering": convolution.default_lowering(),  # Of this process: the CPU's, whatever trains.
    }
    if network.architecture is not None:
        return inference.make_static_predictor(
            setting.spec, architecture=network.architecture, **common
        )
    return inference.make_predictor(setting.spec, controller_variables=state.controller, **common)
