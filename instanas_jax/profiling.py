"""Measures a latency table: every path, stem, head and controller as compiled kernels.

Each row is the median over interleaved rounds of one jitted call at batch 1, waiting for the
result inside the timing, compilation outside. A call costs the host some microseconds that the
whole network pays once, not once a cell, so the time of a call that computes nothing, with the
same number of arguments, is measured in the same rounds and subtracted.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instanas_jax import controller, convolution, environment, ops, skipping, supernet
from instanas_jax.latency import LatencyTable
from instanas_jax.search_space import CANDIDATE_OPS, CellSpec, SupernetSpec

_FASTEST_MS = 1e-4  # A row is a time: noise must not make it zero or negative.


@dataclasses.dataclass(frozen=True)
class _Program:
    run: Callable[[Any, jax.Array], jax.Array]  # Jitted.
    weights: Any
    x: jax.Array

    def seconds(self) -> float:
        """Of one call, with the weights in cache, as they are in a network that answers many
        images: all other programs have run since this one's last call."""
        self.run(self.weights, self.x).block_until_ready()
        start = time.perf_counter()
        self.run(self.weights, self.x).block_until_ready()
        return time.perf_counter() - start


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
      rounds: timed calls of each path.
      lowering: of convolutions; the default device's own if None.
      seed: of weights and inputs, on which no time depends.
      on_round: called after each round, for a progress bar.
    """
    lowering = lowering or convolution.default_lowering()
    fixed, cells = _programs(spec, lowering, jax.random.key(seed))
    distinct = {**{("fixed", name): program for name, program in fixed.items()}, **cells}
    empty_calls = {key: _empty_call(program) for key, program in distinct.items()}
    environment.run_together(
        [program.seconds for program in (*distinct.values(), *empty_calls.values())]
    )

    seconds: dict[Any, list[float]] = {key: [] for key in distinct}
    overhead: dict[Any, list[float]] = {key: [] for key in distinct}
    for _ in range(rounds):
        for key, program in distinct.items():
            seconds[key].append(program.seconds())
            overhead[key].append(empty_calls[key].seconds())
        on_round()

    def median_ms(key: Any) -> float:
        net = np.median(seconds[key]) - np.median(overhead[key])
        return max(float(net) * 1e3, _FASTEST_MS)

    def spread_ms(key: Any) -> float:
        low, high = np.percentile(seconds[key], (25, 75))
        return float(high - low) * 1e3

    keys = [[(cell, op) for op in ops.ALL_OPS] for cell in spec.cells]
    return LatencyTable(
        backend=jax.default_backend(),
        device=environment.describe_device(),
        versions=environment.describe_versions(),
        spec=spec.to_json(),
        batch_size=1,
        dtype="float32",
        fixed_ms={name: median_ms(("fixed", name)) for name in fixed},
        cells_ms=np.array([[median_ms(key) for key in row] for row in keys]),
        spread_ms=np.array([[spread_ms(key) for key in row] for row in keys]),
        repeats=rounds,
    )


def _programs(
    spec: SupernetSpec, lowering: convolution.Lowering, key: jax.Array
) -> tuple[dict[str, _Program], dict[tuple[CellSpec, int], _Program]]:
    """Programs of stem, head and controller, and one for each distinct path."""
    weights = skipping.prepare_weights(spec, supernet.fold(supernet.init(key, spec)))
    controller_weights = controller.fold(controller.init(key, spec))
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
        for op in ops.ALL_OPS:
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


@jax.jit(keep_unused=True)
def _return_bias(weights, x):
    del weights
    return jnp.zeros(())


def _empty_call(program: _Program) -> _Program:
    """The same arguments, nothing computed."""
    return dataclasses.replace(program, run=_return_bias)
