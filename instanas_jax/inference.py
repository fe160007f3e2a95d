"""Skipping execution: only the paths that the controller chose run.

One image goes through one compiled program: controller, greedy mask, a `lax.cond` for each path,
head. It compiles once for all architectures, because the predicate of each branch is a scalar.
(`vmap` would turn the branches into selects that run both sides, so batches need other means.)
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from instanas_jax import augment, controller, convolution, ops, policy, supernet
from instanas_jax.layers import Folded
from instanas_jax.search_space import CANDIDATE_OPS, SupernetSpec

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
    resolved, identity = policy.resolve_empty_cells(mask, spec.forced_cells)
    x = supernet.apply_stem(spec, weights, image, lowering=lowering)
    for index, cell in enumerate(spec.cells):
        shape = (1, cell.out_size, cell.out_size, cell.out_channels)
        total = jnp.zeros(shape) if cell.forces_op else x * identity[0, index]
        for op in ops.ALL_OPS:

            def run(x, total, cell=cell, index=index, op=op):
                y = ops.apply_op(
                    cell, CANDIDATE_OPS[op], weights["paths"][index][op], x, lowering=lowering
                )
                return total + y

            chosen = resolved[0, index, op] > 0.5
            total = lax.cond(chosen, run, lambda x, total: total, x, total)
        x = total * ops.join_scale(resolved[0, index], spec.join)
    return supernet.apply_head(weights, x, lowering=lowering)


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
    x = supernet.apply_stem(spec, weights, image, lowering=lowering)
    for index, cell in enumerate(spec.cells):
        outputs = [
            ops.apply_op(cell, CANDIDATE_OPS[op], weights["paths"][index][op], x, lowering=lowering)
            for op in np.flatnonzero(chosen[index])
        ]
        if outputs:
            x = sum(outputs[1:], start=outputs[0])
            x = x * (1.0 / len(outputs) if spec.join == "mean" else 1.0)
    return supernet.apply_head(weights, x, lowering=lowering)


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

    Weights are constants of the program: as arguments, hundreds of arrays a call cost the host
    more than a small network computes.

    Returns:
      A function giving class_logits [K] and the mask that ran [L, O].
    """
    weights = _on_host(_folded_weights(spec, supernet_variables))
    controller_weights = _on_host(jax.jit(controller.fold)(controller_variables))

    @jax.jit
    def predict(image):
        normalised = augment.normalise(image[None], mean=mean, std=std)
        policy_logits = controller.apply_eval(
            spec, controller_weights, normalised, lowering=lowering
        )
        mask = policy.greedy(policy_logits)
        class_logits = apply_skipping(spec, weights, normalised, mask, lowering=lowering)
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
        class_logits = apply_static(spec, weights, normalised, architecture, lowering=lowering)
        return class_logits[0], jnp.asarray(architecture)

    return predict


def _on_host(weights: Weights) -> Weights:
    """As numpy arrays, which a traced function embeds as constants."""
    return jax.tree.map(np.asarray, weights)


def time_in_turn(predictors: dict[str, Predict], images: Iterable[np.ndarray]) -> dict[str, Any]:
    """Wall-clock milliseconds of every predictor on every image, one at a time.

    All predictors take an image before the next image comes, so that a drifting clock hurts all
    alike. Compilation is outside the timing, waiting for the answer inside.

    Returns:
      For each name an array [number of images].
    """
    images = list(images)
    for predict in predictors.values():
        jax.block_until_ready(predict(images[0]))
    times: dict[str, list[float]] = {name: [] for name in predictors}
    for image in images:
        for name, predict in predictors.items():
            start = time.perf_counter()
            jax.block_until_ready(predict(image))
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: np.asarray(values) for name, values in times.items()}
