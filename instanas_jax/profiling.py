"""Measures a latency table: every path, stem, head and controller as compiled kernels.

Each row is the lower decile over interleaved rounds of a jitted call at batch 1, waiting for the
result inside the timing, compilation outside. In each round the call is made some times untimed, so
that it is as warm as in a network that answers image after image, then as often timed. (A shared
machine changes its speed by 1.4 within milliseconds: of 50 runs of a network the median repeated to
2.9 %, the lower decile to 1.4.) A call costs the host some microseconds that the whole network pays
once, not once a cell, so the time of a call that computes nothing, with the same number of
arguments, is measured in the same rounds and subtracted.

In a network a path costs more than its kernels alone: its switch, weights that have left the
nearest cache, the sum with other paths of its cell. The same rounds time the skipping execution
of random architectures, and what their times have beyond the sum of their rows is fitted by the
figures of `latency.IN_NETWORK`. MobileNetV2 is timed as well, which has neither switches nor a
supernet's weights: compiled for itself, and choosing which of its cells run. Networks read their
image from the host, as who answers does.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instanas_jax import (
    channels,
    controller,
    convolution,
    environment,
    ops,
    skipping,
    supernet,
    whole_networks,
)
from instanas_jax.latency import LatencyTable
from instanas_jax.search_space import CANDIDATE_OPS, CellSpec, SupernetSpec

# Architectures that are timed whole, with from a twentieth to all but a twentieth of their paths.
_NETWORKS = 40
_DENSITIES = (0.05, 0.95)
_DEPTHS = 10  # Of one network that chooses cells, timed whole as well.
# Calls in a row, untimed and then timed, of a program as a network that answers image after image
# runs it. After other programs a network's second call still takes 1.1 times as long as its ninth,
# and those of MobileNetV2's kernels, each by itself, 1.13 times in all; their ninths sum up to its.
_IN_A_ROW = 8


@dataclasses.dataclass(frozen=True)
class _Program:
    run: Callable[[Any, jax.Array], jax.Array]  # Jitted.
    weights: Any
    x: jax.Array

    def __call__(self) -> jax.Array:
        return self.run(self.weights, self.x)


def _seconds(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Of each call, once all have been made untimed, as by `inference.time_in_turn`: other programs
    have run since they were made before."""
    for call in calls:
        jax.block_until_ready(call())
    seconds = []
    for call in calls:
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(
    spec: SupernetSpec,
    *,
    rounds: int = 50,
    lowering: convolution.Lowering | None = None,
    seed: int = 0,
    on_round: Callable[[], object] = lambda: None,
) -> LatencyTable:
    """Times every path of a supernet with random weights on the default device.

    Args:
      rounds: in each, every path is called `_IN_A_ROW` times untimed, then as often timed.
      lowering: of convolutions; the default device's own if None.
      seed: of weights and inputs, on which no time depends, and of the networks that `fit` reads.
      on_round: called after each round, for a progress bar.
    """
    none = np.zeros((0, *spec.mask_shape), np.float32)
    return measure_beside(
        spec, none, rounds=rounds, lowering=lowering, seed=seed, on_round=on_round
    )[0]


def measure_beside(
    spec: SupernetSpec,
    others: np.ndarray,
    calls: Sequence[Callable[[], Any]] = (),
    *,
    rounds: int,
    lowering: convolution.Lowering | None = None,
    seed: int = 0,
    on_round: Callable[[], object] = lambda: None,
) -> tuple[LatencyTable, np.ndarray]:
    """As `measure`; and, in the same rounds, what the table is not fitted to.

    Args:
      others: masks [N, L, O] for the skipping execution of one image, the controller included.
      calls: M of one network, which answers them in a row.

    Returns:
      The table, and milliseconds [rounds, N + M], of which the table's times are `undisturbed`.
    """
    lowering = lowering or convolution.default_lowering()
    fixed, cells = _programs(spec, lowering, jax.random.key(seed))
    distinct = {**{("fixed", name): program for name, program in fixed.items()}, **cells}
    empty_calls = {key: _empty_call(program) for key, program in distinct.items()}
    masks = whole_networks.random_masks(spec, _NETWORKS, densities=_DENSITIES, seed=seed)
    # One program for all masks: where its weights happen to lie in memory is worth 3 %.
    network, all_idle = whole_networks.skipping_network(spec, lowering, jax.random.key(seed))
    depth_masks = whole_networks.depth_masks(spec, _DEPTHS, seed=seed)
    depth_settled = whole_networks.depth_settled(spec)
    depth, depth_idle = whole_networks.skipping_network(
        spec, lowering, jax.random.key(seed), depth_settled
    )
    static, static_idle = whole_networks.static_network(spec, lowering, jax.random.key(seed))
    depths = [functools.partial(depth, jnp.asarray(mask)) for mask in depth_masks]
    whole: list[Callable[[], Any]] = [
        *(functools.partial(network, jnp.asarray(mask)) for mask in masks),
        *(functools.partial(network, jnp.asarray(mask)) for mask in others),
    ]
    environment.run_together([*distinct.values(), *empty_calls.values()])

    shape = (rounds, _IN_A_ROW)
    seconds = {key: np.zeros(shape) for key in distinct}
    overhead = {key: np.zeros(shape) for key in distinct}
    whole_seconds = np.zeros((rounds, len(whole)))
    # Calls that compute nothing, by the arguments of these three.
    idle = {
        "static": static_idle,
        "depth": functools.partial(depth_idle, jnp.asarray(masks[0])),
        "all": functools.partial(all_idle, jnp.asarray(masks[0])),
    }
    idle_seconds = {name: np.zeros(shape) for name in idle}
    static_seconds = np.zeros(shape)
    depth_seconds = np.zeros((rounds, len(depths)))
    call_seconds = np.zeros((rounds, len(calls)))
    for done in range(rounds):
        for key, program in distinct.items():
            seconds[key][done] = _seconds([program] * _IN_A_ROW)
            overhead[key][done] = _seconds([empty_calls[key]] * _IN_A_ROW)
        static_seconds[done] = _seconds([static] * _IN_A_ROW)
        depth_seconds[done] = _seconds(depths)
        call_seconds[done] = _seconds(calls)
        for name, call in idle.items():
            idle_seconds[name][done] = _seconds([call] * _IN_A_ROW)
        whole_seconds[done] = _seconds(whole)
        on_round()

    def undisturbed_ms(key: Any) -> float:
        net = undisturbed(seconds[key].ravel()) - undisturbed(overhead[key].ravel())
        return max(float(net) * 1e3, whole_networks.FASTEST_MS)

    def spread_ms(key: Any) -> float:
        low, high = np.percentile(seconds[key], (25, 75))
        return float(high - low) * 1e3

    keys = [[(cell, op) for op in channels.ALL_OPS] for cell in spec.cells]
    fixed_ms = {name: undisturbed_ms(("fixed", name)) for name in fixed}
    alone_ms = np.array([[undisturbed_ms(key) for key in row] for row in keys])
    random_seconds, other_seconds = np.split(whole_seconds, [len(masks)], axis=1)
    fitted = whole_networks.fit(
        spec,
        whole_networks.Measured(
            alone_ms=alone_ms,
            fixed_ms=fixed_ms,
            masks=masks,
            random_ms=undisturbed(random_seconds) * 1e3,
            depth_masks=depth_masks,
            depths_ms=undisturbed(depth_seconds) * 1e3,
            static_ms=float(undisturbed(static_seconds.ravel())) * 1e3,
            idle_ms={
                name: float(undisturbed(of.ravel())) * 1e3 for name, of in idle_seconds.items()
            },
        ),
    )
    table = LatencyTable(
        backend=jax.default_backend(),
        device=environment.describe_device(),
        versions=environment.describe_versions(),
        spec=spec.to_json(),
        batch_size=1,
        dtype="float32",
        spread_ms=np.array([[spread_ms(key) for key in row] for row in keys]),
        repeats=rounds * _IN_A_ROW,
        **fitted,
    )
    return table, np.concatenate([other_seconds, call_seconds], axis=1) * 1e3


def undisturbed(times: np.ndarray) -> np.ndarray:
    """The lower decile [...] of runs [N, ...]."""
    return np.percentile(times, 10, axis=0)


def _programs(
    spec: SupernetSpec, lowering: convolution.Lowering, key: jax.Array
) -> tuple[dict[str, _Program], dict[tuple[CellSpec, int], _Program]]:
    """Programs of stem, head and controller, and one for each distinct path."""
    weights, controller_weights = jax.device_put(
        (
            skipping.prepare_weights(spec, supernet.fold(supernet.init(key, spec))),
            controller.fold(controller.init(key, spec)),
        )
    )
    image = jax.random.normal(key, (1, spec.image_size, spec.image_size, 3))
    last = spec.cells[-1]

    def features(size: int, channels: int) -> jax.Array:
        return jax.random.normal(key, (1, size, size, channels))

    @jax.jit
    def run_stem(weights, x):
        return supernet.apply_stem(spec, weights, x, lowering=lowering)

    @jax.jit
    def run_head(weights, x):
        return supernet.apply_head(weights, x, lowering=lowering)

    @jax.jit
    def run_controller(weights, x):
        return controller.apply_eval(spec, weights, x, lowering=lowering)

    ends = {name: weights[name] for name in ("head", "classifier")}
    fixed = {
        "stem": _Program(run_stem, {"stem": weights["stem"]}, image),
        "head": _Program(run_head, ends, features(last.out_size, last.out_channels)),
        "controller": _Program(run_controller, controller_weights, image),
    }
    cells: dict[tuple[CellSpec, int], _Program] = {}
    for index, cell in enumerate(spec.cells):
        for op in channels.ALL_OPS:
            if (cell, op) not in cells:  # Cells of equal shapes have one time.
                x = features(cell.in_size, cell.in_channels)
                run = _path_program(cell, op, lowering)
                cells[cell, op] = _Program(run, weights["paths"][index][op], x)
    return fixed, cells


def _path_program(cell: CellSpec, op: int, lowering: convolution.Lowering):
    @jax.jit
    def run_path(weights, x):
        return ops.apply_op(cell, CANDIDATE_OPS[op], weights, x, lowering=lowering)

    return run_path


def _empty_call(program: _Program) -> _Program:
    """The same arguments, nothing computed."""
    return dataclasses.replace(program, run=whole_networks.compute_nothing)
