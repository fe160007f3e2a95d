"""Skipping execution: only the paths that the controller chose run.

One image goes through one compiled program: controller, greedy mask, a `lax.cond` for each cell
and each path, head. It compiles once for all architectures, because predicates are scalars.
(`vmap` would turn the branches into selects that run both sides, so batches need other means.)
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from instanas_jax import augment, controller, convolution, ops, policy, supernet
from instanas_jax.layers import Folded
from instanas_jax.search_space import CANDIDATE_OPS, CellSpec, Join, SupernetSpec

Weights = dict[str, Any]
Predict = Callable[[np.ndarray], tuple[jax.Array, jax.Array]]


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
    codes = _path_codes(resolved[0])
    ends = _read_ends(weights)
    x = supernet.apply_stem(spec, ends, image, lowering=lowering)
    for index, cell in enumerate(spec.cells):
        run = functools.partial(
            _apply_chosen, cell, weights["paths"][index], join=spec.join, lowering=lowering
        )
        skip = functools.partial(_skip_cell, cell)
        x = lax.cond(codes[index] > 0, run, skip, x, codes[index])
    return supernet.apply_head(ends, x, lowering=lowering)


def _path_codes(architecture: jax.Array) -> jax.Array:
    """An architecture [L, O] as an integer a cell, int32 [L]; bit `op` is set where op is on.

    A path's predicate is then computed inside its cell. 85 predicates taken from the mask at
    once are 85 kernels that XLA's runtime spreads over threads before the first cell begins.
    """
    return jnp.sum(architecture.astype(jnp.int32) << jnp.arange(len(ops.ALL_OPS)), axis=-1)


def _read_ends(weights: Weights) -> Weights:
    """Stem, head and classifier, which every architecture runs."""
    return _read({name: weights[name] for name in ("stem", "head", "classifier")})


def _no_output(cell: CellSpec) -> jax.Array:
    return jnp.zeros((1, cell.out_size, cell.out_size, cell.out_channels))


def _skip_cell(cell: CellSpec, x: jax.Array, code: jax.Array) -> jax.Array:
    """An empty cell passes its input on. One that can't be empty is a branch nevertheless, so
    that its predicates are computed inside; this side of it never runs."""
    del code
    return _no_output(cell) if cell.forces_op else x


def _apply_chosen(
    cell: CellSpec,
    paths: list[Folded],
    x: jax.Array,
    code: jax.Array,
    *,
    join: Join,
    lowering: convolution.Lowering,
) -> jax.Array:
    """The paths of one cell whose bits are set, joined; at least one is."""
    active = [(code >> op) & 1 for op in ops.ALL_OPS]
    total = _no_output(cell)
    for op in ops.ALL_OPS:

        def run(x, total, op=op):
            weights = _read(paths[op])  # Here, or a branch that is not taken would still read.
            return total + ops.apply_op(cell, CANDIDATE_OPS[op], weights, x, lowering=lowering)

        total = lax.cond(active[op] == 1, run, lambda x, total: total, x, total)
    return total * ops.join_scale(jnp.stack(active).astype(total.dtype), join)


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
        outputs = [
            ops.apply_op(
                cell, CANDIDATE_OPS[op], _read(weights["paths"][index][op]), x, lowering=lowering
            )
            for op in np.flatnonzero(chosen[index])
        ]
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
            spec, _read(_embed(controller_weights)), normalised, lowering=lowering
        )
        mask = policy.greedy(policy_logits)
        class_logits = apply_skipping(spec, _embed(weights), normalised, mask, lowering=lowering)
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
            spec, _embed(weights), normalised, architecture, lowering=lowering
        )
        return class_logits[0], jnp.asarray(architecture)

    return predict


def _on_host(weights: Weights) -> Weights:
    """As numpy arrays, which `_embed` makes constants of a program."""
    return jax.tree.map(np.asarray, weights)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A small array that lies in a longer vector."""

    vector: jax.Array
    start: int
    shape: tuple[int, ...]

    def read(self) -> jax.Array:
        stop = self.start + math.prod(self.shape)
        return lax.slice(self.vector, (self.start,), (stop,)).reshape(self.shape)


def _embed(weights: Weights) -> Weights:
    """Inside a traced function: numpy weights as few constants of the program.

    Each array has a price in every call, whether its path runs or not: as an argument 1 us, as a
    constant of XLA's CPU client 0.5 us, and a supernet has 480. Matrices and dense kernels have to
    be buffers of their own. Biases and depthwise kernels are read inside fused loops, which
    index one long vector just as well; the barrier keeps XLA from cutting it up again.
    """
    leaves, structure = jax.tree.flatten(weights)
    small = [leaf for leaf in leaves if _is_read_in_loops(leaf)]
    vector = lax.optimization_barrier(jnp.asarray(np.concatenate([leaf.ravel() for leaf in small])))
    starts = iter(np.cumsum([0, *(leaf.size for leaf in small)]).tolist())
    embedded = [
        _Cut(vector, next(starts), leaf.shape) if _is_read_in_loops(leaf) else leaf
        for leaf in leaves
    ]
    return jax.tree.unflatten(structure, embedded)


def _is_read_in_loops(leaf: np.ndarray) -> bool:
    """Whether this is a bias [C] or a depthwise kernel [k, k, C]."""
    return leaf.ndim in (1, 3)


def _read(weights: Weights) -> Weights:
    """Weights as arrays, where `_embed` made some of them cuts of its vector."""
    return jax.tree.map(lambda leaf: leaf.read() if isinstance(leaf, _Cut) else leaf, weights)


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
    for predict in predictors.values():
        jax.block_until_ready(predict(images[0]))
    times: dict[str, list[float]] = {name: [] for name in predictors}
    for first in range(0, len(images), _IMAGES_IN_A_ROW):
        for name, predict in predictors.items():
            jax.block_until_ready(predict(images[first]))  # Its weights come back into cache.
            for image in images[first : first + _IMAGES_IN_A_ROW]:
                start = time.perf_counter()
                jax.block_until_ready(predict(image))
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: np.asarray(values) for name, values in times.items()}
