"""Calls timed in turn, a few of each a turn."""

import time

import jax
import numpy as np

from benchmarks.subjects import Call

Times = dict[str, list[float]]  # Milliseconds of calls by name.

_TIMED_CALLS_IN_A_ROW = 5


def time_in_turn(calls: dict[str, Call], *, turns: int, warming: int) -> Times:
    """Milliseconds of each call.

    Turns go forth and back, or each would always follow the same one.

    Args:
      warming: calls at the start of a turn, not timed, that bring weights and code back into cache.
    """
    times: Times = {name: [] for name in calls}
    for turn in range(turns):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            for _ in range(warming):
                jax.block_until_ready(calls[name]())
            for _ in range(_TIMED_CALLS_IN_A_ROW):
                start = time.perf_counter()
                jax.block_until_ready(calls[name]())
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def medians(values: list[float]) -> np.ndarray:
    """Of each turn."""
    return np.median(np.reshape(values, (-1, _TIMED_CALLS_IN_A_ROW)), axis=1)
