"""Information about depth by hand, by enumeration, at its extremes, and over devices."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instanas_jax import diversity

LN3 = math.log(3.0)  # sigmoid(ln 3) = 3 / 4


class SumOverCellsTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_by_hand(self):
        """Two ops of one cell, both of p' 0.65 for one image and 0.35 for the other: it is empty
        with 0.1225 and 0.4225; h(0.2725) - (h(0.1225) + h(0.4225)) / 2. The other cell is empty
        for both with 0.04, the third never."""
        logits = jnp.array(
            [[[LN3, LN3], [1e4, 1e4], [LN3, 9.0]], [[-LN3, -LN3], [1e4, 1e4], [-LN3, -9.0]]]
        )
        forced = np.array([False, False, True])
        information = self.variant(lambda x: diversity.depth_information(x, forced, bounding=0.8))(
            logits
        )
        expected = 0.585730 - (0.371877 + 0.681086) / 2
        np.testing.assert_allclose(information, expected, atol=1e-5)


class JointTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_by_hand(self):
        """One op, empty with 0.2 and 0.8 by bounding: the two images overlap by 2 sqrt(0.16), and
        with themselves by 1, so that each has ln 0.9. The second cell is never empty."""
        logits = jnp.array([[[1e4], [1e4]], [[-1e4], [-1e4]]])
        information = self.variant(
            lambda x: diversity.depth_information(
                x, np.array([False, True]), bounding=0.8, kind="joint"
            )
        )(logits)
        np.testing.assert_allclose(information, -math.log(0.9), rtol=1e-5)


def information_by_enumeration(empty: np.ndarray) -> float:
    """Of an image, drawn evenly, about which cells run, over all 2^C of what may run."""
    entropy_given, of_all = 0.0, 0.0
    for bits in itertools.product((0, 1), repeat=empty.shape[1]):
        given = np.where(np.array(bits) == 1, empty, 1.0 - empty).prod(axis=1)
        entropy_given -= float(np.mean(given * np.log(given)))
        of_all -= float(given.mean() * np.log(given.mean()))
    return of_all - entropy_given


@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
def test_the_joint_bound_is_below_the_information_and_not_far(scale):
    cells = np.random.default_rng(0).normal(scale=scale, size=(12, 6))
    empty = 1.0 / (1.0 + np.exp(cells))
    bound = diversity.depth_information(
        jnp.asarray(cells, jnp.float32)[..., None], np.zeros(6, bool), bounding=1.0, kind="joint"
    )
    information = information_by_enumeration(empty)
    assert 0.2 * information < bound < information


def test_cells_that_divide_images_alike_add_nothing_together():
    """Four images, two bits: ten cells by the first bit, then half of them by the second."""
    first, second = np.array([1, 1, -1, -1]), np.array([1, -1, 1, -1])
    alike = np.repeat(first[:, None], 10, axis=1)
    two_ways = np.where(np.arange(10) < 5, first[:, None], second[:, None])

    def information(signs: np.ndarray, kind: diversity.DiversityKind) -> float:
        logits = jnp.asarray(50.0 * signs, jnp.float32)[..., None]
        return float(
            diversity.depth_information(logits, np.zeros(10, bool), bounding=1.0, kind=kind)
        )

    for signs, bits in ((alike, 1), (two_ways, 2)):
        assert information(signs, "joint") == pytest.approx(bits * math.log(2.0), rel=1e-4)
        assert information(signs, "cells") == pytest.approx(10 * math.log(2.0), rel=1e-4)


@pytest.mark.parametrize("kind", diversity.DIVERSITY_KINDS)
class TestEveryKind:
    def test_which_op_runs_is_no_depth(self, kind):
        """Sure of every image, and of another op for each."""
        logits = jnp.array([[[200.0, -200.0]], [[-200.0, 200.0]]])
        information = diversity.depth_information(
            logits, np.array([False]), bounding=1.0, kind=kind
        )
        np.testing.assert_allclose(information, 0.0, atol=1e-6)

    def test_equal_policies_say_nothing(self, kind):
        logits = jnp.broadcast_to(jnp.linspace(-2.0, 2.0, 10).reshape(1, 5, 2), (8, 5, 2))
        information = diversity.depth_information(
            logits, np.zeros(5, bool), bounding=0.9, kind=kind
        )
        np.testing.assert_allclose(information, 0.0, atol=1e-5)

    def test_gradient_is_finite_where_probabilities_are_zero(self, kind):
        logits = jnp.array([[[200.0, -200.0]], [[-200.0, -200.0]]])
        value, gradient = jax.value_and_grad(
            lambda x: diversity.depth_information(x, np.array([False]), bounding=1.0, kind=kind)
        )(logits)
        np.testing.assert_allclose(value, math.log(2.0), rtol=1e-6)
        assert np.all(np.isfinite(gradient))

    def test_batch_is_the_global_one(self, kind):
        """In value, and in the mean gradient over devices."""
        logits = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4, 5)), jnp.float32)
        forced = np.array([True, False, False, True])

        def information(x: jax.Array, axis_name: str | None = None) -> jax.Array:
            return diversity.depth_information(
                x, forced, bounding=0.9, kind=kind, axis_name=axis_name
            )

        whole, gradient = jax.value_and_grad(information)(logits)
        shared, gradients = jax.vmap(
            jax.value_and_grad(lambda part: information(part, "devices")), axis_name="devices"
        )(logits.reshape(3, 2, 4, 5))
        np.testing.assert_allclose(shared, np.full(3, whole), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(gradients.reshape(6, 4, 5) / 3, gradient, rtol=1e-3, atol=1e-6)
