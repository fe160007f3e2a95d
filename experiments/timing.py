"""What is timed: the latency table and trained networks, as an inference process would run them.

Both functions start that process on CPUs; see `environment.configure_cpu`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from tqdm import tqdm

from instanas_jax import environment, inference, profiling
from instanas_jax.latency import LatencyTable
from instanas_jax.search_space import SupernetSpec
from instanas_jax.stage import Setting
from instanas_jax.train_state import TrainState


def measure_table(spec: SupernetSpec, *, rounds: int, threads: int) -> LatencyTable:
    """A latency table of this device, with a progress bar."""
    return environment.in_inference_process(profile, spec, rounds, threads=threads)


def profile(spec: SupernetSpec, rounds: int) -> LatencyTable:
    """As `measure_table`, in this process."""
    with tqdm(total=rounds, desc="latency table", unit="round", dynamic_ncols=True) as bar:
        return profiling.measure(spec, rounds=rounds, on_round=bar.update)


def time_networks(
    setting: Setting,
    *,
    statics: dict[str, tuple[TrainState, np.ndarray]],
    variants: dict[str, TrainState],
    images: Iterable[np.ndarray],
    threads: int,
) -> dict[str, np.ndarray]:
    """Milliseconds of every network on every image, one at a time, in turn.

    Args:
      statics: by name, a state on the host and the architecture [L, O] that it runs.
      variants: by name, a state on the host.
      images: uint8 [H, W, 3].
      threads: see `environment.configure_cpu`.

    Returns:
      For each name an array [number of images].
    """
    return environment.in_inference_process(
        _time_networks, setting, statics, variants, images, threads=threads
    )


def _time_networks(
    setting: Setting,
    statics: dict[str, tuple[TrainState, np.ndarray]],
    variants: dict[str, TrainState],
    images: Iterable[np.ndarray],
) -> dict[str, np.ndarray]:
    common: dict[str, Any] = {
        "mean": setting.mean,
        "std": setting.std,
        "lowering": setting.lowering,
    }
    make: dict[str, Callable[[], inference.Predict]] = {
        name: functools.partial(
            inference.make_static_predictor,
            setting.spec,
            supernet_variables=state.supernet,
            architecture=architecture,
            **common,
        )
        for name, (state, architecture) in statics.items()
    }
    for name, state in variants.items():
        make[name] = functools.partial(
            inference.make_predictor,
            setting.spec,
            supernet_variables=state.supernet,
            controller_variables=state.controller,
            **common,
        )
    predictors = environment.run_together(list(make.values()))
    return inference.time_in_turn(dict(zip(make, predictors, strict=True)), images)
