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


def depth_masks(spec: SupernetSpec, count: int, *, seed: int) -> np.ndarray:
    """Masks [count, L, O] of op 0 in every cell that can't be empty and in half of the others."""
    rng = np.random.default_rng(seed)
    masks = np.repeat(_mobilenetv2(spec)[None], count, axis=0).astype(np.float32)
    masks[:, :, MOBILENETV2_OP] *= rng.uniform(size=masks.shape[:2]) < 0.5
    masks[:, spec.forced_cells, MOBILENETV2_OP] = 1.0
    return masks


def depth_settled(spec: SupernetSpec) -> policy.Settled:
    """What the policies of `depth_masks` have settled."""
    running = _mobilenetv2(spec) > 0.5
    return policy.Settled(on=running & spec.forced_cells[:, None], off=~running)


def skipping_network(
    spec: SupernetSpec,
    lowering: convolution.Lowering,
    key: jax.Array,
    settled: policy.Settled | None = None,
) -> tuple[Callable[[jax.Array], Any], Callable[[jax.Array], Any]]:
    """The skipping execution of one image under a mask [L, O] from outside, weights random.

    The controller runs as well, where it would, though its mask is not used. And a call of the same
    arguments that computes nothing.

    Args:
      settled: decisions that every mask agrees with; none by default.
    """
    network = _deploy(spec, lowering, key, settled or policy.Settled.nothing(spec.mask_shape))

    def run(weights, image, mask):
        return network.under(mask).predict(weights, image)

    mask = jax.ShapeDtypeStruct(spec.mask_shape, jnp.float32)
    image = _image(spec)
    compiled = jax.jit(run).lower(network.weights, image, mask).compile()
    nothing = jax.jit(lambda weights, image, mask: jnp.zeros(()), keep_unused=True)
    return (
        functools.partial(compiled, network.weights, image),
        functools.partial(nothing, network.weights, image),
    )


def static_network(
    spec: SupernetSpec, lowering: convolution.Lowering, key: jax.Array
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """MobileNetV2 with random weights, compiled for itself alone; and a call of the same arguments
    that computes nothing."""
    mask = _mobilenetv2(spec)
    network = _deploy(spec, lowering, key, policy.Settled.architecture(mask))
    weights = {"supernet": network.weights["supernet"]}
    image = _image(spec)
    answer = jax.jit(lambda weights, image: network.answer(weights, image, jnp.asarray(mask)))
    nothing = jax.jit(lambda weights, image: jnp.zeros(()), keep_unused=True)
    return functools.partial(answer, weights, image), functools.partial(nothing, weights, image)


def _deploy(
    spec: SupernetSpec, lowering: convolution.Lowering, key: jax.Array, settled: policy.Settled
) -> inference.Network:
    return inference.deploy(
        spec,
        supernet_variables=supernet.init(key, spec),
        controller_variables=controller.init(key, spec),
        mean=_MEAN,
        std=_STD,
        lowering=lowering,
        settled=settled,
    )


def _image(spec: SupernetSpec) -> np.ndarray:
    """On the host, as images come."""
    return np.zeros((1, spec.image_size, spec.image_size, 3), np.uint8)


def fit_switching(
    spec: SupernetSpec, masks: np.ndarray, *, measured_ms: np.ndarray, kernels_ms: np.ndarray
) -> dict[str, float]:
    """What networks [N] that switch take beyond the sum of their kernels, by least squares of the
    relative error. No figure but that of a path is below zero: a kernel timed alone is a program of
    its own, and one of many takes less."""
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
    lowest = [-np.inf if name == "path" else 0.0 for name in features]
    fit = optimize.lsq_linear(columns / measured_ms[:, None], beyond, (lowest, np.inf))
    return dict(zip(features, fit.x.tolist(), strict=True))


def fit_static(
    spec: SupernetSpec, alone_ms: np.ndarray, *, measured_ms: float, fixed_ms: float
) -> dict[str, float]:
    """What MobileNetV2 as a static network takes beyond the sum of its kernels, a path; less than
    zero where kernels of one program take less than each alone.

    Args:
      alone_ms: kernels of each path, [L, O].
      fixed_ms: of stem, head and a call.
    """
    kernels_ms = float((_mobilenetv2(spec) * alone_ms).sum())
    return {"settled_path": (measured_ms - fixed_ms - kernels_ms) / spec.num_cells}


def fit_choosing(
    spec: SupernetSpec, *, measured_ms: np.ndarray, expected_ms: np.ndarray
) -> dict[str, float]:
    """What networks under `depth_masks` [N] take beyond what they would as static ones, for each
    cell that chooses between one op and none; not below zero."""
    choosing = int((~spec.forced_cells).sum())
    beyond_ms = float(np.mean(measured_ms - expected_ms))
    return {"choice": max(beyond_ms, 0.0) / choosing if choosing else 0.0}


def running_paths(spec: SupernetSpec, masks: np.ndarray) -> np.ndarray:
    """Masks [N, L, O], the empty-cell rule applied."""
    return np.asarray(policy.resolve_empty_cells(masks, spec.forced_cells)[0])


def weight_megabytes(spec: SupernetSpec) -> np.ndarray:
    """Of each path, float32; [L, O]."""
    return cost.path_costs(spec)[1] * 4e-6


def _mobilenetv2(spec: SupernetSpec) -> np.ndarray:
    return uniform_architecture(spec, MOBILENETV2_OP)
