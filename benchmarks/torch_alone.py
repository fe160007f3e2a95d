"""PyTorch's update in a process of its own, as a program of its user's would run.

Where images are trained on the CPU, `environment.configure_cpu` keeps freed memory with the process
that it sets up. A peer in that process profits from it as ours does; here nobody has set up
anything.
"""

import concurrent.futures
import multiprocessing
from collections.abc import Callable
from typing import Any

from benchmarks import torch_supernet
from instanas_jax import environment

_step: Callable[[], float]  # Of a process that `own_process` began.


def own_process() -> concurrent.futures.ProcessPoolExecutor:
    """One fresh process, which ends with the block that it is the context of."""
    return concurrent.futures.ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=environment.end_with_parent,
    )


def fastest_step(
    process: concurrent.futures.Executor, *arguments: Any, **settings: Any
) -> torch_supernet.Fastest:
    """`torch_supernet.fastest_step` of these arguments in another process, as its step is."""
    first_loss, trials = process.submit(_make, arguments, settings).result()
    return torch_supernet.Fastest(lambda: process.submit(_update).result(), first_loss, trials)


def _make(
    arguments: tuple[Any, ...], settings: dict[str, Any]
) -> tuple[float, dict[str, torch_supernet.Trial]]:
    global _step
    fastest = torch_supernet.fastest_step(*arguments, **settings)
    _step = fastest.step
    return fastest.first_loss, fastest.trials


def _update() -> float:
    return _step()
