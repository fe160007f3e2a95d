"""A variant's network under other policies, against the masked supernet."""

import numpy as np
import pytest

from experiments import policy_study
from instanas_jax import budget, data_sources, latency, policy
from instanas_jax import data as data_lib
from tests.test_batching import CONTROLLER, PREDICTOR, SPEC, masked, policy_logits
from tests.test_latency import make_table

DATASET = data_lib.split(data_sources.synthetic(train_size=64, test_size=40), validation_size=24)
TABLE = make_table()
NOTHING = policy.Settled.nothing(SPEC.mask_shape)


def accuracy(images, masks) -> float:
    """By the supernet with all paths computed."""
    class_logits = np.asarray(masked(images.images, np.asarray(masks, np.float32)))
    return float((class_logits.argmax(axis=-1) == images.labels).mean())


@pytest.fixture(scope="module")
def logits() -> dict[str, np.ndarray]:
    return {
        name: np.asarray(policy_logits(CONTROLLER, getattr(DATASET, name).images))
        for name in ("validation", "test")
    }


@pytest.fixture(scope="module")
def fields(logits):
    return policy_study.study(
        PREDICTOR.network,
        table=TABLE,
        dataset=DATASET,
        validation_logits=logits["validation"],
        test_logits=logits["test"],
    )


def test_shuffled_masks_are_other_images_masks(fields, logits):
    """The mean over permutations is near that over all pairs of images and masks."""
    masks = logits["test"] >= 0.0
    pairs = [accuracy(DATASET.test, np.roll(masks, shift, axis=0)) for shift in range(len(masks))]
    shuffled = fields["shuffled_accuracy"]
    assert abs(shuffled - np.mean(pairs)) < 0.02 and np.std(pairs) > 0.0
    assert shuffled not in (pairs[0], accuracy(DATASET.test, np.ones_like(masks)))


def test_the_front_is_what_the_threshold_gives(fields, logits):
    curve = budget.Curve.from_json(fields["budget"]["curve"])
    front = fields["budget"]["front"]
    np.testing.assert_allclose(
        [point["budget_ms"] for point in front], np.linspace(*curve.range_ms, 5)
    )
    for point in front:
        for name in ("validation", "test"):
            masks = logits[name] >= point["threshold"]
            assert point[f"{name}_accuracy"] == accuracy(getattr(DATASET, name), masks)
        times = latency.image_ms(TABLE, masks.astype(np.float32), SPEC.forced_cells, NOTHING)
        np.testing.assert_allclose(point["table_ms"], times.mean(), rtol=1e-6)


def test_same_for_all_is_the_slowest_of_common_paths_within_the_budget():
    # Cell 2 holds 11, 12, ... ms: op 0 in three of four images, op 1 in two, op 2 in one.
    masks = np.zeros((4, *SPEC.mask_shape))
    masks[:3, 2, 0] = 1.0
    masks[:2, 2, 1] = 1.0
    masks[0, 2, 2] = 1.0
    fixed_ms = 0.75 + 5.0 + 10.0 + 20.0  # No controller.
    # Cells 0, 1 and 3 are empty, so they run op 4 for every image.
    for budget_ms, ops in ((0.0, []), (11.0, [0]), (23.5, [0, 1]), (99.0, [0, 1, 2])):
        architecture = policy_study.same_for_all(
            masks, NOTHING, table=TABLE, spec=SPEC, budget_ms=fixed_ms + budget_ms
        )
        expected = np.zeros(SPEC.mask_shape)
        expected[SPEC.forced_cells, 4] = 1.0
        expected[2, ops] = 1.0
        np.testing.assert_array_equal(architecture, expected)


def test_what_an_empty_cell_runs_counts_as_its_path():
    """In cell 0, op 0 is on for one image of four; the others run op 4 there."""
    masks = np.zeros((4, *SPEC.mask_shape))
    masks[0, 0, 0] = 1.0
    for budget_ms, ops in ((35.75, [4]), (36.75, [0, 4])):
        architecture = policy_study.same_for_all(
            masks, NOTHING, table=TABLE, spec=SPEC, budget_ms=budget_ms
        )
        np.testing.assert_array_equal(np.flatnonzero(architecture[0]), ops)
    nothing = policy_study.same_for_all(masks * 0, NOTHING, table=TABLE, spec=SPEC, budget_ms=0.0)
    np.testing.assert_array_equal(nothing.sum(axis=1), SPEC.forced_cells)


def test_same_for_all_runs_nothing_beside_others_that_the_policy_never_switches_on():
    """In cell 0 all but op 0 are settled to be off, and op 0 is on for half of the images; the
    others run op 4, since that cell can't be empty. No image runs both."""
    off = np.zeros(SPEC.mask_shape, bool)
    off[0, 1:] = True
    masks = np.zeros((4, *SPEC.mask_shape))
    masks[:2, 0, 0] = 1.0
    settled = policy.Settled(on=np.zeros_like(off), off=off)
    for budget_ms, ops in ((32.0, [0]), (99.0, [])):  # Op 4, of the empty cell, is the slower.
        architecture = policy_study.same_for_all(
            masks, settled, table=TABLE, spec=SPEC, budget_ms=budget_ms
        )
        np.testing.assert_array_equal(np.flatnonzero(architecture[0]), ops)


def test_the_same_architecture_answers_every_image(fields, logits):
    masks = (logits["validation"] >= 0.0).astype(np.float32)
    mean_ms = latency.image_ms(TABLE, masks, SPEC.forced_cells, NOTHING).mean()
    architecture = policy_study.same_for_all(
        masks, NOTHING, table=TABLE, spec=SPEC, budget_ms=mean_ms
    )
    same = np.broadcast_to(architecture, logits["test"].shape)
    assert fields["same_for_all"]["test_accuracy"] == accuracy(DATASET.test, same)
    assert fields["same_for_all"]["table_ms"] <= mean_ms
