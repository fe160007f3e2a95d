"""Whole networks, timed beside a latency table's kernels, and what they take beyond those."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from instanas_jax import controller, convolution, cost, inference, policy, supernet
from instanas_jax.search_space import MOBILENETV2_OP, SupernetSpec, uniform_architecture

_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # No time depends on them.


def random_masks(
    spec: SupernetSpec, count: int, *, densities: tuple[float, float], seed: int
) -> np.ndarray:
    """Masks [count, L, O] with shares of paths on that are drawn evenly from a range."""
    rng = np.random.default_rng(seed)
    shares = rng.uniform(*densities, size=(count, 1, 1))
    return (rng.uniform(size=(count, *spec.mask_shape)) < shares).astype(np.float32)


def skipping_network(
    spec: SupernetSpec, lowering: convolution.Lowering, key: jax.Array
) -> Callable[[jax.Array], Any]:
    """The skipping execution of one image under a mask [L, O] from outside, weights random.

    The controller runs as well, though its mask is not used.
    """
    network = inference.deploy(
        spec,
        supernet_variables=supernet.init(key, spec),
        controller_variables=controller.init(key, spec),
        mean=_MEAN,
        std=_STD,
        lowering=lowering,
    )

    def run(weights, image, mask):
        return network.answer(weights, image, mask), network.decide(weights, image)

    image = jnp.zeros((1, spec.image_size, spec.image_size, 3), jnp.uint8)
    mask = jax.ShapeDtypeStruct(spec.mask_shape, jnp.float32)
    compiled = jax.jit(run).lower(network.weights, image, mask).compile()
    return functools.partial(compiled, network.weights, image)


def static_network(
    spec: SupernetSpec, lowering: convolution.Lowering, key: jax.Array
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """MobileNetV2 with random weights, compiled for itself alone; and a call of the same arguments
    that computes nothing."""
    mask = _mobilenetv2(spec)
    network = inference.deploy(
        spec,
        supernet_variables=supernet.init(key, spec),
        controller_variables=controller.init(key, spec),
        mean=_MEAN,
        std=_STD,
        lowering=lowering,
        settled=policy.Settled.architecture(mask),
    )
    weights = {"supernet": network.weights["supernet"]}
    image = jnp.zeros((1, spec.image_size, spec.image_size, 3), jnp.uint8)
    answer = jax.jit(lambda weights, image: network.answer(weights, image, jnp.asarray(mask)))
    nothing = jax.jit(lambda weights, image: jnp.zeros(()), keep_unused=True)
    return functools.partial(answer, weights, image), functools.partial(nothing, weights, image)


def fit_switching(
    spec: SupernetSpec, masks: np.ndarray, *, measured_ms: np.ndarray, kernels_ms: np.ndarray
) -> dict[str, float]:
    """What networks [N] that switch take beyond the sum of their kernels, by least squares of the
    relative error; no figure is below zero."""
    running = running_paths(spec, masks)
    paths = running.sum(axis=-1)
    features = {
        "switch": np.full(len(masks), spec.num_cells),
        "path": paths.sum(axis=-1),
        "megabyte": (running * weight_megabytes(spec)).sum(axis=(1, 2)),
        "several": np.maximum(paths - 1.0, 0.0).sum(axis=-1),
    }
    columns = np.stack(list(features.values()), axis=1)
    beyond = (measured_ms - kernels_ms) / measured_ms
    figures, _ = optimize.nnls(columns / measured_ms[:, None], beyond)
    return dict(zip(features, figures.tolist(), strict=True))


def fit_static(
    spec: SupernetSpec, alone_ms: np.ndarray, *, measured_ms: float, fixed_ms: float
) -> dict[str, float]:
    """What MobileNetV2 as a static network takes beyond the sum of its kernels, a megabyte of its
    weights; not below zero.

    Args:
      alone_ms: kernels of each path, [L, O].
      fixed_ms: of stem, head and a call.
    """
    running = _mobilenetv2(spec)
    beyond_ms = measured_ms - fixed_ms - float((running * alone_ms).sum())
    return {
        "settled_megabyte": max(beyond_ms, 0.0) / float((running * weight_megabytes(spec)).sum())
    }


def running_paths(spec: SupernetSpec, masks: np.ndarray) -> np.ndarray:
    """Masks [N, L, O], the empty-cell rule applied."""
    return np.asarray(policy.resolve_empty_cells(masks, spec.forced_cells)[0])


def weight_megabytes(spec: SupernetSpec) -> np.ndarray:
    """Of each path, float32; [L, O]."""
    return cost.path_costs(spec)[1] * 4e-6


def _mobilenetv2(spec: SupernetSpec) -> np.ndarray:
    return uniform_architecture(spec, MOBILENETV2_OP)
