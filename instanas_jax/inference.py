"""Predictors: a trained state as one compiled program of one image, and how they are timed."""

import dataclasses
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
    fusion,
    packing,
    policy,
    skipping,
    supernet,
)
from instanas_jax.search_space import SupernetSpec

Predict = Callable[[np.ndarray], tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]]
Rule = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A trained state laid out to answer: batch norm folded, weights packed.

    `decide`, `answer` and `predict` are pure functions of `weights`, to be jitted by whoever runs
    them.

    Attributes:
      spec: of the supernet.
      weights: {"supernet", "controller"}, each `packing.Packed`.
      settled: decisions that no image changes.
      mean, std: of pixels, to normalise by.
      lowering: see `convolution`.
      rule: masks [B, L, O] of the policy's logits; see `budget.Limit` for another.
    """

    spec: SupernetSpec
    weights: dict[str, packing.Packed]
    settled: policy.Settled
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    lowering: convolution.Lowering
    rule: Rule = policy.greedy

    def decide(self, weights: dict[str, packing.Packed], images: jax.Array) -> jax.Array:
        """Masks [B, L, O] of images uint8 [B, H, W, 3]."""
        folded = packing.read(weights["controller"].unpack())
        policy_logits = controller.apply_eval(
            self.spec, folded, self._normalise(images), lowering=self.lowering
        )
        return self.rule(policy_logits)

    def answer(
        self, weights: dict[str, packing.Packed], images: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Class logits [B, K] of images uint8 [B, H, W, 3] that share a mask [L, O]."""
        return skipping.apply_skipping(
            self.spec,
            weights["supernet"].unpack(),
            self._normalise(images),
            mask[None],
            lowering=self.lowering,
            settled=self.settled,
        )

    def predict(
        self, weights: dict[str, packing.Packed], image: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Class logits [1, K] of an image uint8 [1, H, W, 3], and the mask that ran [1, L, O]."""
        return skipping.apply_deciding(
            self.spec,
            weights["supernet"].unpack(),
            self._normalise(image),
            lambda features: self.decide(weights, fusion.after(image, features)),
            lowering=self.lowering,
            settled=self.settled,
        )

    def under(self, mask: jax.Array) -> "Network":
        """This network under a mask [L, O] from outside; the controller runs, for nothing."""
        return dataclasses.replace(
            self, rule=lambda policy_logits: fusion.after(mask[None], policy_logits)
        )

    def _normalise(self, images: jax.Array) -> jax.Array:
        return augment.normalise(images, mean=self.mean, std=self.std)


def deploy(
    spec: SupernetSpec,
    *,
    supernet_variables: dict[str, Any],
    controller_variables: dict[str, Any],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    lowering: convolution.Lowering,
    settled: policy.Settled | None = None,
    rule: Rule = policy.greedy,
) -> Network:
    """Lays a trained state out.

    Args:
      supernet_variables, controller_variables: {"params", "batch_stats"}.
      settled: decisions that no image changes; by default what the controller has settled.
      rule: masks of the policy's logits, which agree with what is settled.
    """
    if settled is None:
        settled = controller.settled(spec, controller_variables)
    weights = {
        "supernet": _packed_paths(spec, supernet_variables, settled),
        "controller": packing.pack(controller.fold(jax.device_get(controller_variables))),
    }
    return Network(spec, weights, settled, mean, std, lowering, rule)


def make_predictor(spec: SupernetSpec, **state: Any) -> Predict:
    """A compiled function of one image, uint8 [H, W, 3], with real skipping inside.

    What the controller has settled (`controller.settle`) is compiled in: such paths need no
    switch or no weights, and where all are settled the controller does not run.

    Args:
      spec: of the supernet.
      state: as for `deploy`.

    Returns:
      A function giving class_logits [K] and the mask that ran [L, O].
    """
    return _predictor(deploy(spec, **state))


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
    weights = {"supernet": _packed_paths(spec, supernet_variables, settled)}
    return _predictor(Network(spec, weights, settled, mean, std, lowering))


def _predictor(network: Network) -> Predict:
    run = compile_predictor(network)
    if not network.settled.everything:
        return run
    architecture = network.settled.on.astype(np.float32)
    architecture.flags.writeable = False  # Every answer holds it.
    return lambda image: (run(image), architecture)


def compile_predictor(network: Network) -> functools.partial:
    """The program of one image, compiled now and kept by whoever holds it alone:
    `environment.release_memory` may clear all that compiling left behind.

    Returns:
      Of an image uint8 [H, W, 3]: class logits [K], and the mask that ran [L, O] unless everything
      is settled. A mask that is a constant would be one more kernel that needs no other. Its `func`
      is the program; see `packing.compile_with`.
    """

    def predict(weights, image):
        if network.settled.everything:
            return network.answer(weights, image[None], jnp.asarray(network.settled.on, float))[0]
        class_logits, mask = network.predict(weights, image[None])
        return class_logits[0], mask[0]

    spec = network.spec
    image = jax.ShapeDtypeStruct((spec.image_size, spec.image_size, 3), jnp.uint8)
    return packing.compile_with(predict, _weights(network), image)


def compile_under_mask(network: Network) -> functools.partial:
    """As `compile_predictor`, of an image [1, H, W, 3] and a mask [L, O] from outside: class logits
    [1, K], and the mask [1, L, O]. The controller runs all the same."""

    def predict(weights, image, mask):
        return network.under(mask).predict(weights, image)

    spec = network.spec
    image = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), jnp.uint8)
    mask = jax.ShapeDtypeStruct(spec.mask_shape, jnp.float32)
    return packing.compile_with(predict, network.weights, image, mask)


def _weights(network: Network) -> dict[str, packing.Packed]:
    """Without the controller's, where it decides nothing."""
    if network.settled.everything:
        return {"supernet": network.weights["supernet"]}
    return network.weights


def _packed_paths(
    spec: SupernetSpec, variables: dict[str, Any], settled: policy.Settled
) -> packing.Packed:
    # On the host: a program that only cuts weights would take seconds to compile.
    folded = supernet.fold(jax.device_get(variables))
    weights = skipping.prepare_weights(spec, folded, settled)
    return packing.pack(weights, in_branch=skipping.in_branch(spec, settled))


# A deployed network answers many images one after another, with its weights in cache; networks
# that alternate image by image would time each other's cache misses.
_IMAGES_IN_A_ROW = 8


def time_in_turn(predictors: dict[str, Predict], images: Iterable[np.ndarray]) -> dict[str, Any]:
    """Wall-clock milliseconds of every predictor on every image, one at a time.

    Predictors take turns every few images, so that a drifting clock hurts all alike. Each answers
    those of its turn once before: after another network, the first six or so take up to 1.15 times
    as long. Waiting for the answer is inside the timing.

    Returns:
      For each name an array [number of images].
    """
    images = list(images)
    times: dict[str, list[float]] = {name: [] for name in predictors}
    for first in range(0, len(images), _IMAGES_IN_A_ROW):
        few = images[first : first + _IMAGES_IN_A_ROW]
        for name, predict in predictors.items():
            jax.block_until_ready([predict(image) for image in few])
            for image in few:
                start = time.perf_counter()
                jax.block_until_ready(predict(image))
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: np.asarray(values) for name, values in times.items()}
