"""The Bernoulli policy by hand, its independence of the batch, and the empty-cell rule."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from instanas_jax import policy, search_space
from instanas_jax.errors import InputError

LN3 = math.log(3.0)  # sigmoid(ln 3) = 3 / 4


def numpy_log_prob(mask: np.ndarray, policy_logits: np.ndarray, bounding: float) -> np.ndarray:
    """The definition, in float64 and probabilities rather than logarithms."""
    p = 1.0 / (1.0 + np.exp(-policy_logits.astype(np.float64)))
    bounded = bounding * p + (1.0 - bounding) * (1.0 - p)
    chosen = np.where(mask == 1.0, bounded, 1.0 - bounded)
    return np.log(chosen).sum(axis=(-2, -1))


class LogProbabilitiesTest(chex.TestCase):
    @chex.all_variants
    def test_bounded_by_hand(self):
        # p = 1/2, 3/4, 1/4, 1, 0, so p' = 0.8 p + 0.2 (1 - p) = 0.5, 0.65, 0.35, 0.8, 0.2.
        logits = jnp.array([[0.0, LN3, -LN3, 1e4, -1e4]])
        log_p, log_q = self.variant(lambda x: policy.log_probabilities(x, bounding=0.8))(logits)
        np.testing.assert_allclose(jnp.exp(log_p), [[0.5, 0.65, 0.35, 0.8, 0.2]], rtol=1e-6)
        np.testing.assert_allclose(jnp.exp(log_q), [[0.5, 0.35, 0.65, 0.2, 0.8]], rtol=1e-6)

    @chex.all_variants
    def test_log_prob_agrees_with_its_definition(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(scale=3.0, size=(6, 4, 5)).astype(np.float32)
        mask = rng.integers(0, 2, logits.shape).astype(np.float32)
        for bounding in (0.5, 0.8, 1.0):
            log_prob = self.variant(
                lambda m, x, bounding=bounding: policy.log_prob(m, x, bounding=bounding)
            )
            expected = numpy_log_prob(mask, logits, bounding)
            np.testing.assert_allclose(log_prob(mask, logits), expected, rtol=1e-5)

    @chex.all_variants
    def test_entropy_by_hand(self):
        # p' = 1/2, 0.65 and 0.35. One-sided: -sum p' ln p' = 0.34657 + 0.28001 + 0.36744.
        # Binary: ln 2 = 0.69315, and 0.28001 + 0.36744 = 0.64745 twice.
        logits = jnp.array([[[0.0, LN3, -LN3]]])
        one_sided = self.variant(lambda x: policy.entropy(x, bounding=0.8, kind="one_sided"))
        binary = self.variant(lambda x: policy.entropy(x, bounding=0.8, kind="binary"))
        np.testing.assert_allclose(one_sided(logits), [0.99402], atol=1e-5)
        np.testing.assert_allclose(binary(logits), [1.98804], atol=1e-5)

    @chex.all_variants(with_pmap=False)
    def test_greedy_threshold(self):
        logits = jnp.array([-1.0, -1e-30, 0.0, 1e-30, 1.0])
        np.testing.assert_array_equal(self.variant(policy.greedy)(logits), [0, 0, 1, 1, 1])

    def test_no_bounding_is_finite_with_finite_gradients_at_large_logits(self):
        logits = jnp.array([[[-1e4, -200.0, -5.0, 0.0, 5.0, 200.0, 1e4]]])
        for mask in (jnp.zeros_like(logits), jnp.ones_like(logits)):

            def objective(x, mask=mask):
                entropy = policy.entropy(x, bounding=1.0, kind="binary")
                one_sided = policy.entropy(x, bounding=1.0, kind="one_sided")
                return jnp.sum(policy.log_prob(mask, x, bounding=1.0) + entropy + one_sided)

            chex.assert_tree_all_finite(jax.value_and_grad(objective)(logits))
        # d log sigmoid(x) / dx = 1 - sigmoid(x): 1 far left, 1/2 in the middle, 0 far right.
        slope = jax.grad(lambda x: policy.log_prob(jnp.ones_like(x), x, bounding=1.0).sum())
        np.testing.assert_allclose(slope(logits)[0, 0, [0, 3, 6]], [1.0, 0.5, 0.0], atol=1e-7)

    def test_what_is_settled_is_not_explored_and_has_no_gradient(self):
        """Logits of 200 without bounds beside others within: neither sees the other."""
        on, off = np.zeros((2, 2, 2), bool)
        on[0, 0] = off[1, 1] = True
        settled = policy.Settled(on, off)
        bounding = settled.bounding(0.8)
        free = jnp.array([[[0.0, 0.3], [-0.7, 0.0]]])
        logits = free + 200.0 * on - 200.0 * off
        keys = jax.random.split(jax.random.key(0), 64)
        every = jnp.broadcast_to(logits, (64, 2, 2))
        masks = np.asarray(policy.sample(keys, every, bounding=bounding))
        assert (masks[:, on] == 1).all() and (masks[:, off] == 0).all()
        undecided = ~(on | off)
        assert 0.0 < masks[:, undecided].mean() < 1.0

        def score(x, bounding):
            log_prob = policy.log_prob(masks[:1], x, bounding=bounding)
            return jnp.sum(log_prob + policy.entropy(x, bounding=bounding))

        value, slope = jax.value_and_grad(score)(logits, bounding)
        assert (slope[:, on | off] == 0.0).all()
        alone = jax.grad(score)(free, 0.8)
        np.testing.assert_allclose(slope[:, undecided], alone[:, undecided], rtol=1e-5)
        left = np.asarray(free)[:, undecided][:, None]
        parts = numpy_log_prob(masks[:1, undecided][:, None], left, 0.8)
        entropies = policy.entropy(jnp.asarray(left), bounding=0.8)
        np.testing.assert_allclose(value, parts.sum() + entropies.sum(), rtol=1e-5)
        assert policy.Settled.nothing((2, 2)).bounding(0.8) == 0.8

    @settings(max_examples=50, deadline=None)
    @given(
        hnp.arrays(np.float32, (4,), elements=st.floats(-50, 50, width=32)), st.floats(0.5, 0.999)
    )
    def test_probabilities_stay_in_their_bounds_and_sum_to_one(self, logits, bounding):
        log_p, log_q = policy.log_probabilities(jnp.asarray(logits), bounding=bounding)
        p, q = np.exp(np.asarray(log_p, np.float64)), np.exp(np.asarray(log_q, np.float64))
        np.testing.assert_allclose(p + q, 1.0, atol=1e-5)
        assert np.all(p >= 1 - bounding - 1e-5) and np.all(p <= bounding + 1e-5)


class SampleTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_draw_depends_on_its_own_key_and_logits_alone(self):
        sample = self.variant(lambda keys, x: policy.sample(keys, x, bounding=0.8))
        logits = jax.random.normal(jax.random.key(1), (3, 4, 5))
        keys = jax.random.split(jax.random.key(2), 3)
        mask = np.asarray(sample(keys, logits))

        others = jax.random.split(jax.random.key(3), 3)
        changed = sample(others.at[1].set(keys[1]), (-logits).at[1].set(logits[1]))
        np.testing.assert_array_equal(changed[1], mask[1])
        assert np.any(changed[0] != mask[0])  # The others did change.
        np.testing.assert_array_equal(sample(keys[::-1], logits[::-1]), mask[::-1])
        np.testing.assert_array_equal(sample(keys[2:], logits[2:]), mask[2:])

    def test_frequencies_are_the_bounded_probabilities(self):
        logits = jnp.array([[0.0, LN3, -LN3, 1e4, -1e4]])
        keys = jax.random.split(jax.random.key(0), 4000)
        mask = policy.sample(keys, jnp.broadcast_to(logits, (4000, 1, 5)), bounding=0.8)
        assert mask.dtype == jnp.float32 and set(np.unique(mask)) == {0.0, 1.0}
        # Five standard deviations of a mean of 4000 are at most 5 sqrt(0.25 / 4000) = 0.04.
        np.testing.assert_allclose(mask.mean(0)[0], [0.5, 0.65, 0.35, 0.8, 0.2], atol=0.04)

    def test_path_dropout(self):
        keys = jax.random.split(jax.random.key(0), 200)
        paths, forced = np.ones((4, 5), bool), np.array([True, False, False, True])
        drop = functools.partial(policy.path_dropout, paths=paths, forced_cells=forced)
        np.testing.assert_array_equal(drop(keys, keep=0.0), 0.0)
        np.testing.assert_array_equal(drop(keys, keep=1.0), 1.0)
        mask = drop(keys, keep=0.7)
        assert mask.shape == (200, 4, 5)
        assert float(mask.mean()) == pytest.approx(0.7, abs=0.04)  # 4000 draws, as above.
        np.testing.assert_array_equal(drop(keys[5:6], keep=0.7), mask[5:6])

    def test_path_dropout_leaves_no_cell_to_a_path_that_is_not_there(self):
        keys = jax.random.split(jax.random.key(0), 200)
        forced = np.array([True, False, True])
        paths = np.zeros((3, 5), bool)
        paths[0, [0, 1]] = paths[1, [0, 1]] = paths[2, [0, policy.FORCED_OP]] = True
        mask = np.asarray(policy.path_dropout(keys, paths, forced, 0.3))
        assert not mask[:, ~paths].any()
        of_cells = mask.sum(axis=-1)
        assert (of_cells[:, 0] > 0).all()
        nothing_kept = np.asarray(policy.path_dropout(keys, paths, forced, 0.0))
        np.testing.assert_array_equal(nothing_kept[:, 0], np.broadcast_to(paths[0], (200, 5)))
        assert not nothing_kept[:, 1:].any()
        # An empty draw of two paths, 0.49 of them, has both; where the fallback is, it stays.
        np.testing.assert_allclose((of_cells == 0).mean(axis=0), [0.0, 0.49, 0.49], atol=0.18)
        np.testing.assert_allclose((of_cells == 2).mean(axis=0), [0.58, 0.09, 0.09], atol=0.18)


_resolve = jax.jit(policy.resolve_empty_cells)
masks = hnp.arrays(np.float32, (3, 4, 5), elements=st.sampled_from([0.0, 0.0, 0.0, 1.0]))
forced = hnp.arrays(np.bool_, (4,))


class EmptyCellsTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_by_hand(self):
        mask = jnp.array([[0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], jnp.float32)
        resolve = self.variant(lambda m: policy.resolve_empty_cells(m, np.array([1, 1, 0], bool)))
        resolved, identity = resolve(mask)
        expected = [[0, 0, 0, 0, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]
        np.testing.assert_array_equal(resolved, expected)
        np.testing.assert_array_equal(identity, [0, 0, 1])

    @settings(max_examples=100, deadline=None)
    @given(masks, forced)
    def test_a_cell_runs_something_or_is_the_identity_never_both(self, mask, forced):
        resolved, identity = _resolve(mask, forced)
        np.testing.assert_array_equal(np.asarray(resolved).any(-1), np.asarray(identity) == 0.0)

    @settings(max_examples=100, deadline=None)
    @given(masks, forced)
    def test_only_empty_first_cells_change(self, mask, forced):
        resolved, identity = _resolve(mask, forced)
        empty = ~mask.any(-1)
        changed = (np.asarray(resolved) != mask).any(-1)
        np.testing.assert_array_equal(changed, empty & forced)
        np.testing.assert_array_equal(np.asarray(identity) == 1.0, empty & ~forced)
        assert np.isin(resolved, (0.0, 1.0)).all()

    @settings(max_examples=50, deadline=None)
    @given(masks, forced)
    def test_applying_it_twice_changes_nothing(self, mask, forced):
        once = _resolve(mask, forced)
        twice = _resolve(once[0], forced)
        chex.assert_trees_all_equal(once, twice)


class TestSettled:
    # Of cell 0, path 0 is on for all four images, path 1 for three, path 2 for one.
    MASKS = np.zeros((4, 2, 5))
    MASKS[:, 0, 0] = 1
    MASKS[:3, 0, 1] = 1
    MASKS[0, 0, 2] = 1

    def test_by_hand(self):
        settled = policy.Settled.by_masks(self.MASKS)
        np.testing.assert_array_equal(settled.on, [[1, 0, 0, 0, 0], [0] * 5])
        np.testing.assert_array_equal(settled.off, [[0, 0, 0, 1, 1], [1] * 5])
        assert not settled.everything

    def test_tolerance_overrules_a_quarter_of_the_images(self):
        settled = policy.Settled.by_masks(self.MASKS, tolerance=0.25)
        np.testing.assert_array_equal(settled.on, [[1, 1, 0, 0, 0], [0] * 5])
        assert settled.everything

    def test_between_two_thresholds(self):
        """On for good is what is on at the higher one, off for good what is off at the lower."""
        generous = self.MASKS.copy()
        generous[0, 1, 3] = 1
        settled = policy.Settled.by_thresholds(self.MASKS, generous)
        np.testing.assert_array_equal(settled.on, [[1, 0, 0, 0, 0], [0] * 5])
        np.testing.assert_array_equal(settled.off, [[0, 0, 0, 1, 1], [1, 1, 1, 0, 1]])
        assert policy.Settled.by_thresholds(self.MASKS, generous, tolerance=0.25).everything

    def test_where_nothing_else_may_run_the_rule_has_decided(self):
        masks = np.zeros((2, 3, 5))
        masks[0, :, policy.FORCED_OP] = 1  # The other image leaves all three cells empty.
        masks[1, 2, 0] = 1
        settled = policy.Settled.by_masks(masks).by_the_rule(np.array([True, False, True]))
        forced = np.arange(5) == policy.FORCED_OP
        np.testing.assert_array_equal(settled.on, [forced, forced & False, forced & False])
        np.testing.assert_array_equal(
            settled.off, [~forced, ~forced, [False, True, True, True, False]]
        )

    def test_what_may_run_holds_the_op_of_forced_cells_that_can_be_empty(self):
        settled = policy.Settled.by_masks(self.MASKS)
        undecided = [1, 1, 1, 0, 0]  # Path 0 is always on, so the cell is never empty.
        np.testing.assert_array_equal(
            settled.may_run(np.array([True, True])), [undecided, [0, 0, 0, 0, 1]]
        )
        np.testing.assert_array_equal(
            settled.may_run(np.array([True, False])), [undecided, [0, 0, 0, 0, 0]]
        )

    @settings(deadline=None)  # The first call compiles.
    @given(masks, forced)
    def test_no_image_runs_anything_else(self, masks, forced):
        resolved, _ = policy.resolve_empty_cells(masks, forced)
        may_run = policy.Settled.by_masks(masks).may_run(forced)
        assert not np.asarray(resolved)[:, ~may_run].any()


class TestValidateMask:
    def test_masks_of_an_image_and_of_a_batch_become_float32(self):
        for shape in ((4, 5), (3, 4, 5)):
            mask = policy.validate_mask(np.ones(shape, np.int64), (4, 5))
            assert mask.dtype == np.float32 and mask.shape == shape

    @pytest.mark.parametrize("shape", [(5,), (5, 4), (3, 5, 4), (1, 3, 4, 5)])
    def test_another_shape_is_named(self, shape):
        with pytest.raises(InputError) as error:
            policy.validate_mask(np.zeros(shape), (4, 5))
        assert str(list(shape)) in str(error.value) and "[4, 5]" in str(error.value)

    @pytest.mark.parametrize("value", [0.5, -1.0, 2.0, np.nan, np.inf])
    def test_another_value_is_named(self, value):
        mask = np.zeros((4, 5))
        mask[2, 3] = value
        with pytest.raises(InputError, match=str(value)):
            policy.validate_mask(mask, (4, 5))


class TestDescribe:
    SPEC = search_space.preset("px32", num_classes=10)

    def test_an_architecture_on_one_line(self):
        """Cells 0, 1, 3, 6, 10, 13 and 16 can't be empty: they run basic_conv, others nothing."""
        architecture = np.zeros(self.SPEC.mask_shape)
        architecture[[1, 2, 3], 1] = 1.0
        architecture[4, [0, 3]] = 1.0
        architecture[15, 2] = 1.0
        assert policy.describe(architecture, self.SPEC.forced_cells) == (
            "0 basic, 1-3 k3e3, 4 k3e6+k5e3, 5 skip, 6 basic, 7-9 skip, 10 basic, 11-12 skip, "
            "13 basic, 14 skip, 15 k5e6, 16 basic"
        )

    def test_one_op_everywhere(self):
        everywhere = search_space.uniform_architecture(self.SPEC, 0)
        assert policy.describe(everywhere, self.SPEC.forced_cells) == "0-16 k3e6"

    def test_running_ops(self):
        architecture = np.zeros(self.SPEC.mask_shape)
        architecture[1, [4, 0]] = 1.0
        running = policy.running_ops(architecture, self.SPEC.forced_cells)
        names = [[op.name for op in ops] for ops in running]
        assert names[:4] == [["basic_conv"], ["mbconv_k3_e6", "basic_conv"], [], ["basic_conv"]]
        assert len(names) == 17
