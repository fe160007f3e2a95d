"""Predictors: a trained state as one compiled program of one image, and how they are timed."""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instanas_jax import (
    augment,
    controller,
    convolution,
    environment,
    packing,
    policy,
    skipping,
    supernet,
)
from instanas_jax.search_space import SupernetSpec

Predict = Callable[[np.ndarray], tuple[jax.Array, jax.Array]]


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

    What the controller has settled (`controller.settle`) is compiled in: such paths need no
    switch or no weights, and where all are settled the controller does not run.

    Returns:
      A function giving class_logits [K] and the mask that ran [L, O].
    """
    settled = controller.settled(spec, controller_variables)
    if settled.everything:
        return make_static_predictor(
            spec,
            supernet_variables=supernet_variables,
            architecture=settled.on.astype(np.float32),
            mean=mean,
            std=std,
            lowering=lowering,
        )
    weights = _folded_weights(spec, supernet_variables, settled)
    controller_weights = _on_host(jax.jit(controller.fold)(controller_variables))

    @jax.jit
    def predict(image):
        normalised = augment.normalise(image[None], mean=mean, std=std)
        policy_logits = controller.apply_eval(
            spec, packing.read(packing.embed(controller_weights)), normalised, lowering=lowering
        )
        mask = policy.greedy(policy_logits)
        class_logits = skipping.apply_skipping(
            spec, packing.embed(weights), normalised, mask, lowering=lowering, settled=settled
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
    settled = policy.Settled.architecture(architecture)
    weights = _folded_weights(spec, supernet_variables, settled)

    @jax.jit
    def predict(image):
        normalised = augment.normalise(image[None], mean=mean, std=std)
        mask = jnp.asarray(architecture)
        class_logits = skipping.apply_skipping(
            spec, packing.embed(weights), normalised, mask[None], lowering=lowering, settled=settled
        )
        return class_logits[0], mask

    return predict


def _folded_weights(
    spec: SupernetSpec, variables: dict[str, Any], settled: policy.Settled
) -> skipping.Weights:
    return _on_host(
        jax.jit(
            lambda variables: skipping.prepare_weights(spec, supernet.fold(variables), settled)
        )(variables)
    )


def _on_host(weights: skipping.Weights) -> skipping.Weights:
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
