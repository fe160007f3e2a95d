"""REINFORCE with the greedy answer as baseline: values and gradients derived by hand."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from instanas_jax import policy_gradient

LN3 = math.log(3.0)

# Two images, one cell, one op; bounding 0.8, so p' = 0.2 + 0.6 p and dp'/dz = 0.6 p (1 - p).
#   image 0: z = 0, p = 1/2, p' = 0.5, dp'/dz = 0.15; mask 1, advantage 2.
#   image 1: z = ln 3, p = 3/4, p' = 0.65, dp'/dz = 0.1125; mask 0, advantage -1.
LOGITS = np.array([0.0, LN3], np.float32).reshape(2, 1, 1)
MASK = np.array([1.0, 0.0], np.float32).reshape(2, 1, 1)
ADVANTAGE = np.array([2.0, -1.0], np.float32)
# -advantage log pi: -2 ln 0.5 = 1.386294, and ln(1 - 0.65) = -1.049822. Slopes by
# d log p' = dp'/p': -2 x 0.15 / 0.5 = -0.6; and -dp'/(1 - p') = -0.1125 / 0.35 = -0.321429.
REINFORCE = (1.386294, -1.049822)
REINFORCE_SLOPES = (-0.6, -0.321429)
# H one-sided = -p' ln p': 0.346574 and 0.280009; slope -(ln p' + 1) dp'/dz: -0.3068528 x 0.15 =
# -0.046028 and -0.5692171 x 0.1125 = -0.064037. Binary: 0.693147 and 0.647447; slope
# ln((1 - p') / p') dp'/dz: 0 and -0.619039 x 0.1125 = -0.069642.
ENTROPY = {"one_sided": (0.346574, 0.280009), "binary": (0.693147, 0.647447)}
ENTROPY_SLOPES = {"one_sided": (-0.046028, -0.064037), "binary": (0.0, -0.069642)}


class ReinforceLossTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    @parameterized.parameters("one_sided", "binary")
    def test_value_and_gradient_by_hand(self, kind):
        def loss(logits, mask, advantage):
            return policy_gradient.reinforce_loss(
                logits, mask, advantage, bounding=0.8, entropy_weight=0.5, entropy_kind=kind
            )

        value, slope = self.variant(jax.value_and_grad(loss))(LOGITS, MASK, ADVANTAGE)
        expected = np.mean(np.subtract(REINFORCE, np.multiply(0.5, ENTROPY[kind])))
        # The mean over two images halves each one's slope.
        slopes = np.subtract(REINFORCE_SLOPES, np.multiply(0.5, ENTROPY_SLOPES[kind])) / 2
        np.testing.assert_allclose(value, expected, atol=1e-5)
        np.testing.assert_allclose(slope[:, 0, 0], slopes, atol=1e-5)

    def test_the_authors_one_sided_entropy_is_the_default(self):
        arguments = {"bounding": 0.8, "entropy_weight": 1.0}
        loss = policy_gradient.reinforce_loss(LOGITS, MASK, jnp.zeros(2), **arguments)
        # Advantage 0 leaves -mean entropy: -(0.346574 + 0.280009) / 2.
        np.testing.assert_allclose(loss, -0.313291, atol=1e-5)

    def test_sums_over_cells_and_ops(self):
        # Two cells of three ops at z = 0, nothing but the log probability: -1 x 6 ln 0.5.
        loss = policy_gradient.reinforce_loss(
            jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3)), jnp.ones(1), bounding=0.8, entropy_weight=0.0
        )
        np.testing.assert_allclose(loss, 6 * math.log(2.0), rtol=1e-6)

    def test_no_gradient_flows_through_the_advantage(self):
        slope = jax.grad(
            lambda advantage: policy_gradient.reinforce_loss(
                LOGITS, MASK, advantage, bounding=0.8, entropy_weight=0.5
            )
        )(jnp.asarray(ADVANTAGE))
        np.testing.assert_array_equal(slope, 0.0)

    def test_a_step_down_the_loss_makes_a_better_than_greedy_sample_likelier(self):
        logits = jnp.zeros((1, 1, 5))
        mask = jnp.array([[[1.0, 0.0, 1.0, 0.0, 1.0]]])
        slope = jax.grad(policy_gradient.reinforce_loss)(
            logits, mask, jnp.ones(1), bounding=0.8, entropy_weight=0.0
        )
        np.testing.assert_array_equal(np.sign(-slope), [[[1, -1, 1, -1, 1]]])


class AdvantageTest(chex.TestCase):
    @chex.all_variants
    def test_by_hand(self):
        advantage = self.variant(policy_gradient.self_critical_advantage)(
            jnp.array([[30.0, 0.0, 12.0]]), jnp.array([[10.0, 15.0, 12.0]])
        )
        np.testing.assert_array_equal(advantage, [[20.0, -15.0, 0.0]])


class LeaveOneOutTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_by_hand(self):
        # Two images, three samples. The first's others average 4.5, 3 and 1.5.
        advantage = self.variant(policy_gradient.leave_one_out_advantage)(
            jnp.array([[0.0, 7.0], [3.0, 7.0], [6.0, 7.0]])
        )
        np.testing.assert_allclose(advantage, [[-4.5, 0.0], [0.0, 0.0], [4.5, 0.0]], atol=1e-6)


class StandardiseTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_values_by_hand(self):
        # Mean 2, deviations -2, 0, 2: standard deviation sqrt(8 / 3) = 1.632993.
        standardised = self.variant(policy_gradient.standardise)(jnp.array([0.0, 2.0, 4.0]))
        np.testing.assert_allclose(standardised, [-1.224745, 0.0, 1.224745], atol=1e-5)

    def test_equal_rewards_reinforce_nothing(self):
        np.testing.assert_array_equal(policy_gradient.standardise(jnp.full(4, 0.1)), np.zeros(4))

    def test_mean_and_spread_are_the_global_batchs(self):
        values = jnp.array([[0.0, 2.0], [4.0, 6.0]])
        shared = jax.vmap(
            lambda row: policy_gradient.standardise(row, axis_name="devices"), axis_name="devices"
        )(values)
        whole = policy_gradient.standardise(values.ravel())
        np.testing.assert_allclose(shared.ravel(), whole, atol=1e-6)
