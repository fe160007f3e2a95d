"""A latency budget is met by the threshold at which a policy decides."""

import jax
import numpy as np
import pytest

from instanas_jax import budget, controller, latency, policy
from instanas_jax.errors import InputError
from tests.networks import as_if_trained
from tests.test_latency import SPEC, make_table

TABLE = make_table()  # Cell 2, which may be empty, holds 11 to 15 ms.
FIXED_MS = 0.5 + 0.25 + 0.125 + 5.0 + 10.0 + 20.0  # Parts of the network, forced cells' last op.


def one_undecided(path=(2, 0)) -> policy.Settled:
    """Everything off for good but one path."""
    off = np.ones(SPEC.mask_shape, bool)
    off[path] = False
    return policy.Settled(on=np.zeros(SPEC.mask_shape, bool), off=off)


def logits_of_one_path(values) -> np.ndarray:
    """[N, L, O]; what is settled has logits that no threshold should look at."""
    logits = np.zeros((len(values), *SPEC.mask_shape), np.float32)
    logits[:, 2, 0] = values
    return logits


def calibrate(logits, settled) -> budget.Curve:
    return budget.calibrate(logits, table=TABLE, spec=SPEC, settled=settled)


def test_a_curve_by_hand():
    curve = calibrate(logits_of_one_path([-1.0, 1.0, 2.0, 3.0]), one_undecided())
    lowest, highest = curve.range_ms
    np.testing.assert_allclose([lowest, highest], [FIXED_MS, FIXED_MS + 11.0], rtol=1e-6)
    np.testing.assert_allclose(curve.as_trained_ms, FIXED_MS + 11.0 * 3 / 4, rtol=1e-6)
    assert (np.diff(curve.thresholds) > 0).all() and (np.diff(curve.table_ms) <= 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_other_images_take_what_was_asked_for(seed):
    """Calibrated on some images, met on others of the same kind, over the whole range."""
    rng = np.random.default_rng(seed)
    on, off = (rng.uniform(size=SPEC.mask_shape) < share for share in (0.1, 0.4))
    settled = policy.Settled(on=on, off=off & ~on)
    center = rng.normal(scale=2.0, size=SPEC.mask_shape)
    logits = rng.normal(center, 1.0, size=(4000, *SPEC.mask_shape)).astype(np.float32)
    curve = calibrate(logits[:2000], settled)
    for budget_ms in np.linspace(*curve.range_ms, 7):
        masks = budget.masks_at(budget.threshold(curve, budget_ms), logits[2000:], settled)
        assert masks[:, settled.on].all() and not masks[:, settled.off].any()
        taken = latency.image_ms(TABLE, masks, SPEC.forced_cells, settled).mean()
        np.testing.assert_allclose(taken, budget_ms, rtol=0.02)


def test_of_several_thresholds_the_one_nearest_to_zero():
    """The forced op of cell 1 takes longer than its path 0: less may cost more."""
    curve = budget.Curve(np.array([-3.0, -1.0, 0.5, 2.0]), np.array([5.0, 3.0, 5.0, 2.0]))
    assert budget.threshold(curve, 4.0) == -0.25
    assert budget.threshold(curve, 5.0) == 0.5
    assert budget.threshold(curve, 2.0) == 2.0


def test_a_budget_out_of_reach_names_what_is_within():
    curve = budget.Curve(np.array([-1.0, 0.0, 1.0]), np.array([3.0, 2.5, 2.0]))
    assert budget.threshold(curve, 3.0004) == -1.0 and budget.threshold(curve, 1.9996) == 1.0
    for budget_ms in (1.99, 3.01, np.nan, -1.0, np.inf):
        with pytest.raises(InputError, match=r"2\.000 to 3\.000 ms"):
            budget.threshold(curve, budget_ms)


def test_where_nothing_is_left_to_decide_one_budget_remains():
    settled = policy.Settled.architecture(np.ones(SPEC.mask_shape))
    curve = calibrate(np.zeros((3, *SPEC.mask_shape)), settled)
    assert curve.thresholds.tolist() == [0.0]
    lowest, highest = curve.range_ms
    assert lowest == highest and budget.threshold(curve, round(lowest, 3)) == 0.0
    with pytest.raises(InputError, match="everything is settled"):
        budget.threshold(curve, lowest + 1.0)


def test_at_the_fast_end_everything_undecided_is_off_where_logits_are_tied():
    logits = logits_of_one_path([0.1, 0.1, 0.1])
    curve = calibrate(logits, one_undecided())
    threshold = budget.threshold(curve, curve.range_ms[0])
    assert not budget.masks_at(threshold, logits, one_undecided()).any()
    variables = controller.settle(controller.init(jax.random.key(0), SPEC), one_undecided())
    linear = variables["params"]["logits"]
    linear["kernel"][0, 10] = 1e-30  # Of the undecided path, as good as constant.
    linear["bias"][10] = np.float32(0.1)
    moved = controller.decide_at(variables, threshold)
    assert moved["params"]["logits"]["bias"][10] < 0.0


def test_the_controller_that_decides_at_a_threshold_gives_these_masks():
    variables = as_if_trained(controller.init(jax.random.key(0), SPEC), seed=1)
    settled = one_undecided()
    images = np.random.default_rng(0).normal(size=(64, 32, 32, 3)).astype(np.float32)

    def logits_of(variables) -> np.ndarray:
        folded = controller.fold(variables)
        return np.asarray(controller.apply_eval(SPEC, folded, images, lowering="native"))

    for some in (policy.Settled.nothing(SPEC.mask_shape), settled):
        trained = controller.settle(variables, some)
        before = logits_of(trained)
        threshold = float(np.median(before[:, 2, 0])) + 1e-3
        moved = controller.decide_at(trained, threshold)
        masks = budget.masks_at(threshold, before, some)
        assert 0.0 < masks[:, 2, 0].mean() < 1.0
        np.testing.assert_array_equal(policy.greedy(logits_of(moved)), masks)
        np.testing.assert_array_equal(controller.settled(SPEC, moved).off, some.off)


def test_a_curve_travels_as_json():
    curve = calibrate(logits_of_one_path([-1.0, 2.0]), one_undecided())
    again = budget.Curve.from_json(curve.to_json())
    np.testing.assert_array_equal(again.thresholds, curve.thresholds)
    np.testing.assert_array_equal(again.table_ms, curve.table_ms)


@pytest.mark.parametrize(
    "values",
    [
        {},
        None,
        {"thresholds": [0.0], "table_ms": [1.0, 2.0]},
        {"thresholds": [0.0, 1.0], "table_ms": [1.0, float("nan")]},
        {"thresholds": "abc", "table_ms": [1.0]},
        {"thresholds": 0.0, "table_ms": 1.0},
        {"thresholds": [], "table_ms": []},
    ],
)
def test_something_else_is_no_curve(values):
    with pytest.raises((ValueError, TypeError, KeyError)):
        budget.Curve.from_json(values)


class TestLimit:
    RNG = np.random.default_rng(7)
    SETTLED = policy.Settled(
        on=np.arange(20).reshape(SPEC.mask_shape) == 2,  # One path of cell 0.
        off=np.isin(np.arange(20).reshape(SPEC.mask_shape), (3, 6, 12)),
    )
    LOGITS = RNG.normal(0.5, 1.0, size=(50, *SPEC.mask_shape)).astype(np.float32)

    def limit(self, limit_ms: float) -> budget.Limit:
        return budget.limit(limit_ms, table=TABLE, spec=SPEC, settled=self.SETTLED)

    def times(self, masks) -> np.ndarray:
        return latency.image_ms(TABLE, masks, SPEC.forced_cells, self.SETTLED)

    def least_masks(self) -> np.ndarray:
        """Every way to run what is settled and, in a forced cell without, one path or none."""
        bare = self.SETTLED.on.astype(np.float32)
        masks = [bare]
        for cell in np.flatnonzero(SPEC.forced_cells & ~self.SETTLED.on.any(axis=-1)):
            for mask in list(masks):
                for op in np.flatnonzero(~self.SETTLED.off[cell]):
                    masks.append(mask.copy())
                    masks[-1][cell, op] = 1.0
        return np.stack(masks)

    @property
    def sure_ms(self) -> float:
        return float(self.times(self.least_masks()).max())

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
    def test_every_image_runs_the_surest_of_its_paths_that_fit(self, share):
        unlimited = budget.masks_at(0.0, self.LOGITS, self.SETTLED)
        limit_ms = self.sure_ms + share * (self.times(unlimited).max() - self.sure_ms)
        masks = np.asarray(jax.jit(self.limit(limit_ms).masks)(self.LOGITS))
        assert (self.times(masks) <= limit_ms + 1e-4).all()
        assert masks[:, self.SETTLED.on].all() and (masks <= unlimited).all()
        # A cell that can't be empty keeps a path where it has one.
        forced = SPEC.forced_cells
        np.testing.assert_array_equal(
            masks[:, forced].any(axis=-1), unlimited[:, forced].any(axis=-1)
        )
        left_away = (unlimited > masks).any(axis=(1, 2))
        assert left_away.any() and (share == 0.0 or not left_away.all())
        for logits, mask, whole in zip(self.LOGITS, masks, unlimited, strict=True):
            away = sorted(np.argwhere(whole > mask).tolist(), key=lambda path: -logits[*path])
            for cell, op in away[:1]:  # Less sure than all that stays, but for cells in need.
                stays = (mask > 0.5) & ~self.SETTLED.on
                stays &= ~(forced[:, None] & (stays.sum(axis=-1) == 1)[:, None])
                assert not stays.any() or logits[cell, op] <= logits[stays].min()
            more = mask.copy()
            for path in away:  # However many are added, surest first.
                more[*path] = 1.0
                assert self.times(more) > limit_ms

    def test_one_that_no_image_meets_changes_nothing(self):
        unlimited = budget.masks_at(0.0, self.LOGITS, self.SETTLED)
        masks = self.limit(float(self.times(unlimited).max()) + 1.0).masks(self.LOGITS)
        np.testing.assert_array_equal(masks, unlimited)

    def test_of_equally_sure_paths_the_earlier_ones_run(self):
        logits = np.full((1, *SPEC.mask_shape), -1.0, np.float32)
        logits[0, 2, [0, 1, 4]] = 1.0  # 11, 12 and 15 ms.
        one, two = logits.copy(), logits.copy()
        one[0, 2, [1, 4]] = -1.0
        two[0, 2, 4] = -1.0
        for fewer in (one, two):
            expected = budget.masks_at(0.0, fewer, self.SETTLED)
            limited = self.limit(float(self.times(expected)[0])).masks(logits)
            np.testing.assert_array_equal(limited, expected)

    @pytest.mark.parametrize("less_ms", [1.0, np.nan, np.inf])
    def test_one_out_of_reach_names_the_least(self, less_ms):
        with pytest.raises(InputError, match=f"less than {self.sure_ms:.3f} ms"):
            self.limit(self.sure_ms - less_ms)

    def test_where_everything_is_settled_it_is_one_time(self):
        settled = policy.Settled.architecture(np.eye(4, 5))
        least_ms = float(latency.image_ms(TABLE, settled.on, SPEC.forced_cells, settled))
        limit = budget.limit(least_ms, table=TABLE, spec=SPEC, settled=settled)
        np.testing.assert_array_equal(limit.masks(self.LOGITS)[0], np.eye(4, 5))
