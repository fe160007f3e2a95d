"""Whole networks, timed beside a latency table's kernels, and what they take beyond those."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from instanas_jax import controller, convolution, cost, inference, policy, supernet
from instanas_jax.search_space import MOBILENETV2_OP, SupernetSpec, uniform_architecture

FASTEST_MS = 1e-4  # A row is a time: noise must not make it zero or negative.
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
    program = inference.compile_under_mask(_deploy(spec, lowering, key, settled))
    return _with_idle(program, _image(spec)[None])


def static_network(
    spec: SupernetSpec, lowering: convolution.Lowering, key: jax.Array
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """MobileNetV2 with random weights, compiled for itself alone; and a call of the same arguments
    that computes nothing."""
    settled = policy.Settled.architecture(_mobilenetv2(spec))
    program = inference.compile_predictor(_deploy(spec, lowering, key, settled))
    return _with_idle(program, _image(spec))


def _with_idle(
    program: functools.partial, image: np.ndarray
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A program's answer to an image, and what passes it as many arguments, for nothing."""
    idle = functools.partial(compute_nothing, *program.args, image)
    return functools.partial(program, image), idle


@functools.partial(jax.jit, keep_unused=True)
def compute_nothing(*arguments: Any) -> jax.Array:
    """What it costs to call a program of these arguments."""
    del arguments
    return jnp.zeros(())


def _deploy(
    spec: SupernetSpec,
    lowering: convolution.Lowering,
    key: jax.Array,
    settled: policy.Settled | None,
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
    return np.zeros((spec.image_size, spec.image_size, 3), np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """Milliseconds of one supernet's kernels and of whole networks.

    Attributes:
      alone_ms: [L, O], kernels of each path.
      fixed_ms: kernels of stem, head and controller.
      masks, random_ms: [N, L, O] and [N], of the network of which nothing is settled.
      depth_masks, depths_ms: the same of the network that chooses cells.
      static_ms: of MobileNetV2 compiled for itself.
      idle_ms: calls that compute nothing, with the arguments of these three, by the names `all`,
        `depth` and `static`.
    """

    alone_ms: np.ndarray
    fixed_ms: dict[str, float]
    masks: np.ndarray
    random_ms: np.ndarray
    depth_masks: np.ndarray
    depths_ms: np.ndarray
    static_ms: float
    idle_ms: dict[str, float]


def fit(spec: SupernetSpec, measured: Measured) -> dict[str, Any]:
    """What a latency table says of a supernet: its `fixed_ms`, `cells_ms`, `settled_ms` and
    `in_network_ms`."""
    static_idle_ms = measured.idle_ms["static"]
    # More arguments cost more, whatever noise says.
    depth_idle_ms = max(measured.idle_ms["depth"], static_idle_ms)
    path_weights_ms = max(measured.idle_ms["all"] - depth_idle_ms, 0.0)
    held_ms = path_weights_ms / (measured.alone_ms.size - spec.num_cells)
    call_ms = max(static_idle_ms - held_ms * spec.num_cells, 0.0)

    mobilenetv2_ms = float((_mobilenetv2(spec) * measured.alone_ms).sum())
    ends = ("stem", "head")
    beyond_ms = measured.static_ms - static_idle_ms - mobilenetv2_ms
    beyond_ms -= sum(measured.fixed_ms[end] for end in ends)
    figures = {"call": call_ms, "held": held_ms}
    figures["settled_path"] = beyond_ms / (spec.num_cells + len(ends))
    settled_ms = np.maximum(measured.alone_ms + figures["settled_path"], FASTEST_MS) + held_ms
    # Stem, head and controller were programs of their own as well.
    fixed_ms = {
        name: max(ms + figures["settled_path"], FASTEST_MS)
        for name, ms in measured.fixed_ms.items()
    }
    fixed_ms["controller"] += depth_idle_ms - static_idle_ms

    kernels_ms = (running_paths(spec, measured.masks) * measured.alone_ms).sum(axis=(1, 2))
    every_image_ms = sum(fixed_ms.values()) + static_idle_ms + path_weights_ms
    figures |= _fit_switching(spec, measured, kernels_ms + every_image_ms)
    switching_ms = figures["path"] + figures["megabyte"] * weight_megabytes(spec)

    static_ms = (measured.depth_masks * settled_ms).sum(axis=(1, 2))
    choosing_ms = float(np.mean(measured.depths_ms - static_ms)) - sum(fixed_ms.values()) - call_ms
    optional = int((~spec.forced_cells).sum())
    figures["choice"] = max(choosing_ms, 0.0) / optional if optional else 0.0
    return {
        "fixed_ms": fixed_ms,
        "cells_ms": np.maximum(measured.alone_ms + switching_ms, FASTEST_MS),
        "settled_ms": settled_ms,
        "in_network_ms": figures,
    }


def _fit_switching(
    spec: SupernetSpec, measured: Measured, expected_ms: np.ndarray
) -> dict[str, float]:
    """What the network of which nothing is settled takes beyond the times [N] that its kernels and
    its call take, by least squares of the relative error."""
    running = running_paths(spec, measured.masks)
    paths = running.sum(axis=-1)
    features = {
        "switch": np.full(len(running), spec.num_cells),
        "path": paths.sum(axis=-1),
        "megabyte": (running * weight_megabytes(spec)).sum(axis=(1, 2)),
        "several": np.maximum(paths - 1.0, 0.0).sum(axis=-1),
    }
    columns = np.stack(list(features.values()), axis=1) / measured.random_ms[:, None]
    beyond = (measured.random_ms - expected_ms) / measured.random_ms
    lowest = [-np.inf if name == "path" else 0.0 for name in features]
    found = optimize.lsq_linear(columns, beyond, (lowest, np.inf), method="bvls")
    return dict(zip(features, found.x.tolist(), strict=True))


def running_paths(spec: SupernetSpec, masks: np.ndarray) -> np.ndarray:
    """Masks [N, L, O], the empty-cell rule applied."""
    return np.asarray(policy.resolve_empty_cells(masks, spec.forced_cells)[0])


def weight_megabytes(spec: SupernetSpec) -> np.ndarray:
    """Of each path, float32; [L, O]."""
    return cost.path_costs(spec)[1] * 4e-6


def _mobilenetv2(spec: SupernetSpec) -> np.ndarray:
    return uniform_architecture(spec, MOBILENETV2_OP)
