"""Skipping execution: only the paths that the controller chose run.

One image goes through one compiled program: controller, greedy mask, a `lax.switch` for each cell,
head. It compiles once for all architectures, because the switches' indices are scalars.
(`vmap` would turn the branches into selects that run both sides, so batches need other means.)
"""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from instanas_jax import (
    augment,
    controller,
    convolution,
    environment,
    ops,
    packing,
    policy,
    supernet,
)
from instanas_jax.layers import Folded
from instanas_jax.search_space import CANDIDATE_OPS, CellSpec, Join, SupernetSpec

Weights = dict[str, Any]
Predict = Callable[[np.ndarray], tuple[jax.Array, jax.Array]]
Path = Callable[[jax.Array], jax.Array]  # One op of a cell, weights inside.


def prepare_weights(spec: SupernetSpec, supernet_folded: Folded) -> Weights:
    """Folded weights laid out a path each, so that a branch reads its own arrays whole."""
    weights: Weights = {name: supernet_folded[name] for name in ("stem", "head", "classifier")}
    weights["paths"] = [
        [ops.op_weights(cell, supernet_folded[supernet.cell_name(index)], op) for op in ops.ALL_OPS]
        for index, cell in enumerate(spec.cells)
    ]
    return weights


def _folded_weights(spec: SupernetSpec, variables: dict[str, Any]) -> Weights:
    return jax.jit(lambda variables: prepare_weights(spec, supernet.fold(variables)))(variables)


def apply_skipping(
    spec: SupernetSpec,
    weights: Weights,
    image: jax.Array,
    mask: jax.Array,
    *,
    lowering: convolution.Lowering,
) -> jax.Array:
    """Class logits of one image, running the paths of its mask alone.

    Args:
      weights: from `prepare_weights`.
      image: normalised [1, H, W, 3].
      mask: [1, L, O], traced.

    Returns:
      [1, K], equal to `supernet.apply_eval` within rounding.
    """
    resolved, _ = policy.resolve_empty_cells(mask, spec.forced_cells)
    codes, branches = _decisions(resolved[0])
    ends = _read_ends(weights)
    x = supernet.apply_stem(spec, ends, image, lowering=lowering)
    for index, cell in enumerate(spec.cells):
        runs = _path_programs(cell, weights["paths"][index], lowering)
        x = _apply_cell(cell, runs, x, codes[index], branches[index], spec.join)
    return supernet.apply_head(ends, x, lowering=lowering)


# Branches of a cell: one for each op alone, then these two.
_SEVERAL = len(ops.ALL_OPS)
_NONE = _SEVERAL + 1


def _decisions(architecture: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each cell of an architecture [L, O] does.

    Returns:
      The cell as an integer whose bit `op` is set where op is on, and its branch; int32 [L].
    """
    on = architecture.astype(jnp.int32)
    codes = jnp.sum(on << jnp.arange(len(ops.ALL_OPS)), axis=-1)
    count = jnp.sum(on, axis=-1)
    alone = jnp.argmax(on, axis=-1).astype(jnp.int32)
    branches = jnp.where(count == 1, alone, jnp.where(count == 0, _NONE, _SEVERAL))
    # Computed for all cells at once; else XLA would make kernels of it for every cell.
    return lax.optimization_barrier((codes, branches))


def _path_programs(
    cell: CellSpec, paths: list[Folded], lowering: convolution.Lowering
) -> list[Path]:
    def program(op: int) -> Path:
        return lambda x: ops.apply_op(
            cell, CANDIDATE_OPS[op], packing.read(paths[op]), x, lowering=lowering
        )

    return [program(op) for op in ops.ALL_OPS]


def _apply_cell(
    cell: CellSpec,
    runs: list[Path],
    x: jax.Array,
    code: jax.Array,
    branch: jax.Array,
    join: Join,
) -> jax.Array:
    """One cell under its decision.

    Most cells run one op or none: such a branch is as short as a static network's cell.
    """

    def several(x: jax.Array) -> jax.Array:
        return _apply_several(cell, runs, x, code, join)

    def none(x: jax.Array) -> jax.Array:
        return x

    return lax.switch(branch, [*runs, several, *([] if cell.forces_op else [none])], x)


def _apply_several(
    cell: CellSpec,
    runs: list[Path],
    x: jax.Array,
    code: jax.Array,
    join: Join,
) -> jax.Array:
    """The paths whose bits are set, one after another, joined."""

    def add_next(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        remaining, total = state
        lowest_bit = remaining & -remaining
        op = lax.population_count(lowest_bit - 1)
        added = lax.switch(op, [lambda x, total, run=run: total + run(x) for run in runs], x, total)
        return remaining - lowest_bit, added

    nothing = jnp.zeros((1, cell.out_size, cell.out_size, cell.out_channels))
    _, total = lax.while_loop(lambda state: state[0] != 0, add_next, (code, nothing))
    active = (code >> jnp.arange(len(runs))) & 1
    return total * ops.join_scale(active.astype(total.dtype), join)


def _read_ends(weights: Weights) -> Weights:
    """Stem, head and classifier, which every architecture runs."""
    return packing.read({name: weights[name] for name in ("stem", "head", "classifier")})


def apply_static(
    spec: SupernetSpec,
    weights: Weights,
    image: jax.Array,
    architecture: np.ndarray,
    *,
    lowering: convolution.Lowering,
) -> jax.Array:
    """Class logits [B, K] of one architecture [L, O] that is fixed when the program compiles."""
    with jax.ensure_compile_time_eval():
        resolved, _ = policy.resolve_empty_cells(jnp.asarray(architecture), spec.forced_cells)
        chosen = np.asarray(resolved) > 0.5
    ends = _read_ends(weights)
    x = supernet.apply_stem(spec, ends, image, lowering=lowering)
    for index, cell in enumerate(spec.cells):
        runs = _path_programs(cell, weights["paths"][index], lowering)
        outputs = [runs[op](x) for op in np.flatnonzero(chosen[index])]
        if outputs:
            x = sum(outputs[1:], start=outputs[0])
            x = x * (1.0 / len(outputs) if spec.join == "mean" else 1.0)
    return supernet.apply_head(ends, x, lowering=lowering)


def make_predictor(
    spec: SupernetSpec,
    *,
    supernet_variables: dict[str, Any],
    controller_variables: dict[str, Any],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    lowering: convolution.Lowering,
) -> Predict:
    """A compiled function of one image, uint8 [H, W, 3], with real skipping inside.

    Returns:
      A function giving class_logits [K] and the mask that ran [L, O].
    """
    weights = _on_host(_folded_weights(spec, supernet_variables))
    controller_weights = _on_host(jax.jit(controller.fold)(controller_variables))

    @jax.jit
    def predict(image):
        normalised = augment.normalise(image[None], mean=mean, std=std)
        policy_logits = controller.apply_eval(
            spec, packing.read(packing.embed(controller_weights)), normalised, lowering=lowering
        )
        mask = policy.greedy(policy_logits)
        class_logits = apply_skipping(
            spec, packing.embed(weights), normalised, mask, lowering=lowering
        )
        return class_logits[0], mask[0]

    return predict


def make_static_predictor(
    spec: SupernetSpec,
    *,
    supernet_variables: dict[str, Any],
    architecture: np.ndarray,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    lowering: convolution.Lowering,
) -> Predict:
    """As `make_predictor`, without a controller: compiled for one architecture [L, O]."""
    weights = _on_host(_folded_weights(spec, supernet_variables))

    @jax.jit
    def predict(image):
        normalised = augment.normalise(image[None], mean=mean, std=std)
        class_logits = apply_static(
            spec, packing.embed(weights), normalised, architecture, lowering=lowering
        )
        return class_logits[0], jnp.asarray(architecture)

    return predict


def _on_host(weights: Weights) -> Weights:
    """As numpy arrays, which `packing.embed` makes constants of a program."""
    return jax.tree.map(np.asarray, weights)


# A deployed network answers many images one after another, with its weights in cache; networks
# that alternate image by image would time each other's cache misses.
_IMAGES_IN_A_ROW = 8


def time_in_turn(predictors: dict[str, Predict], images: Iterable[np.ndarray]) -> dict[str, Any]:
    """Wall-clock milliseconds of every predictor on every image, one at a time.

    Predictors take turns every few images, so that a drifting clock hurts all alike.
    Compilation is outside the timing, waiting for the answer inside.

    Returns:
      For each name an array [number of images].
    """
    images = list(images)
    environment.run_together(
        [functools.partial(predict, images[0]) for predict in predictors.values()]
    )
    times: dict[str, list[float]] = {name: [] for name in predictors}
    for first in range(0, len(images), _IMAGES_IN_A_ROW):
        for name, predict in predictors.items():
            jax.block_until_ready(predict(images[first]))  # Its weights come back into cache.
            for image in images[first : first + _IMAGES_IN_A_ROW]:
                start = time.perf_counter()
                jax.block_until_ready(predict(image))
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: np.asarray(values) for name, values in times.items()}
