"""The reward's parabola, its gate and its falling bound, by hand."""

import chex
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from instanas_jax import rewards

bounds = st.tuples(st.floats(0.1, 50.0), st.floats(1.0, 50.0)).map(lambda b: (b[0], b[0] + b[1]))


class LatencyRewardTest(chex.TestCase):
    @chex.all_variants
    @parameterized.parameters(
        # With bounds 10 and 20: -(12.5 - 20)(12.5 - 10) / 5^2 = 18.75 / 25 = 0.75.
        (1.0, [0.0, 0.0, 0.75, 1.0, 0.75, 0.0, 0.0]),
        (2.0, [0.0, 0.0, 0.5625, 1.0, 0.5625, 0.0, 0.0]),
        (0.0, [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]),
    )
    def test_by_hand(self, exponent, expected):
        latency_ms = jnp.array([[5.0, 10.0, 12.5, 15.0, 17.5, 20.0, 100.0]])
        reward = self.variant(
            lambda t: rewards.latency_reward(t, lower_ms=10.0, upper_ms=20.0, exponent=exponent)
        )(latency_ms)
        np.testing.assert_allclose(reward, [expected], atol=1e-6)

    @settings(max_examples=50, deadline=None)
    @given(bounds, st.floats(-2.0, 2.0), st.floats(0.25, 4.0))
    def test_between_zero_and_one_and_symmetric_about_the_middle(self, bounds, offset, exponent):
        lower, upper = bounds
        middle, half = (lower + upper) / 2, (upper - lower) / 2
        latency_ms = jnp.array([middle - offset * half, middle + offset * half])
        reward = rewards.latency_reward(
            latency_ms, lower_ms=lower, upper_ms=upper, exponent=exponent
        )
        assert np.all(reward >= 0.0) and np.all(reward <= 1.0 + 1e-4)
        if abs(offset) > 1.001:
            np.testing.assert_array_equal(reward, 0.0)
        elif abs(offset) < 0.9:  # Near the bounds a small exponent amplifies rounding.
            np.testing.assert_allclose(reward[0], reward[1], atol=1e-2)
            np.testing.assert_allclose(reward[0], (1 - offset**2) ** exponent, atol=1e-2)


class TaskRewardTest(chex.TestCase):
    @chex.all_variants
    def test_a_weight_for_right_and_one_for_wrong(self):
        reward = self.variant(
            lambda c: rewards.right_reward(c, positive_weight=30.0, negative_weight=-10.0)
        )(jnp.array([[True, False]]))
        np.testing.assert_array_equal(reward, [[30.0, -10.0]])

    @chex.all_variants
    def test_information_is_none_of_a_guess_and_one_of_certainty(self):
        # A guess among 4 costs ln 4 nats, half of its information ln 2, an eighth's belief ln 8.
        loss = jnp.log(jnp.array([[1.0, 2.0, 4.0, 8.0]]))
        reward = self.variant(lambda x: rewards.information_reward(x, num_classes=4))(loss)
        np.testing.assert_allclose(reward, [[1.0, 0.5, 0.0, 0.0]], atol=1e-6)


class GatedRewardTest(chex.TestCase):
    @chex.all_variants
    def test_latency_counts_only_where_the_task_is_done(self):
        reward = self.variant(rewards.gated_reward)(
            jnp.array([[30.0, -10.0, 30.0, 0.0]]), jnp.array([[0.5, 0.5, 0.0, 1.0]])
        )
        np.testing.assert_array_equal(reward, [[15.0, -10.0, 0.0, 0.0]])


class FallingUpperBoundTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_linear_and_clipped(self):
        bound = self.variant(
            lambda share: rewards.falling_upper_bound(share, start_ms=20.0, end_ms=10.0)
        )(jnp.array([-0.5, 0.0, 0.25, 1.0, 1.5]))
        np.testing.assert_allclose(bound, [20.0, 20.0, 17.5, 10.0, 10.0])

    def test_equal_ends_make_the_static_reward(self):
        assert float(rewards.falling_upper_bound(0.3, start_ms=7.0, end_ms=7.0)) == 7.0
