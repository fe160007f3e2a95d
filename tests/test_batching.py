"""Batches of any size and mixture of masks give the masked supernet's answers."""

import jax
import numpy as np
import pytest

from instanas_jax import (
    augment,
    batching,
    controller,
    environment,
    inference,
    policy,
    supernet,
)
from instanas_jax.errors import InputError
from instanas_jax.search_space import preset
from tests.networks import as_if_trained

SPEC = preset("tiny", num_classes=10)
VARIABLES = as_if_trained(supernet.init(jax.random.key(0), SPEC))
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (23, 32, 32, 3), dtype=np.uint8)

masked = jax.jit(
    lambda images, masks: supernet.apply_eval(
        SPEC,
        supernet.fold(VARIABLES),
        augment.normalise(images, mean=MEAN, std=STD),
        masks,
        lowering="native",
    )
)


def policy_logits(variables, images):
    normalised = augment.normalise(images, mean=MEAN, std=STD)
    return controller.apply_eval(SPEC, controller.fold(variables), normalised, lowering="native")


def undecided_controller():
    """Its mean logits over the images are zero, so each path is on for some of them."""
    variables = as_if_trained(controller.init(jax.random.key(2), SPEC), seed=1)
    linear = variables["params"]["logits"]
    linear["bias"] -= np.asarray(policy_logits(variables, IMAGES)).mean(axis=0).ravel()
    return variables


CONTROLLER = undecided_controller()


def make(controller_variables) -> batching.BatchPredictor:
    network = inference.deploy(
        SPEC,
        supernet_variables=VARIABLES,
        controller_variables=controller_variables,
        mean=MEAN,
        std=STD,
        lowering="shifted",
    )
    return batching.BatchPredictor(network, threads=2)


PREDICTOR = make(CONTROLLER)


def relative_errors(answers, expected):
    expected = np.asarray(expected)
    return np.linalg.norm(answers - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


@pytest.mark.parametrize("size", [1, 5, 8, 23])
def test_each_image_runs_under_the_controllers_mask(size):
    images = IMAGES[:size]
    class_logits, masks = PREDICTOR(images)
    np.testing.assert_array_equal(masks, policy.greedy(policy_logits(CONTROLLER, images)))
    assert relative_errors(class_logits, masked(images, masks)).max() < 1e-4


def mixtures():
    one = RNG.uniform(size=SPEC.mask_shape) < 0.4
    other = RNG.uniform(size=SPEC.mask_shape) < 0.4
    yield "all_equal", np.tile(one, (23, 1, 1))
    yield "all_different", RNG.uniform(size=(23, *SPEC.mask_shape)) < 0.3
    yield "two_in_turn", np.stack([one, other] * 12)[:23]
    yield "nothing_on", np.zeros((23, *SPEC.mask_shape))


@pytest.mark.parametrize(("name", "masks"), list(mixtures()))
def test_any_mixture_of_masks_equals_masked(name, masks):
    masks = masks.astype(np.float32)
    answers = PREDICTOR.answer(IMAGES, masks)
    assert relative_errors(answers, masked(IMAGES, masks)).max() < 1e-4


@pytest.mark.parametrize(("name", "masks"), list(mixtures()))
def test_every_image_is_in_one_chunk_of_its_own_mask(name, masks):
    chunks = list(batching.chunks_of(masks))
    places = np.concatenate([places for places, _ in chunks])
    np.testing.assert_array_equal(np.sort(places), np.arange(len(masks)))
    for places, mask in chunks:
        assert len(places) <= batching.CHUNK
        for place in places:
            np.testing.assert_array_equal(masks[place], mask)
    most = {"all_equal": 3, "all_different": 23, "two_in_turn": (1 + 4) + (1 + 3), "nothing_on": 3}
    assert len(chunks) == most[name]


def test_a_settled_policy_answers_without_its_controller():
    architecture = RNG.uniform(size=SPEC.mask_shape) < 0.5
    settled = controller.settle(CONTROLLER, policy.Settled.architecture(architecture))
    class_logits, masks = make(settled)(IMAGES)
    assert (masks == architecture).all()
    assert relative_errors(class_logits, masked(IMAGES, masks)).max() < 1e-4


def test_as_many_programs_run_as_the_process_has_processors(monkeypatch):
    """Not as the machine has, whose others XLA's pool does not use either."""
    monkeypatch.setattr(environment, "usable_processors", lambda: 3)
    assert batching.BatchPredictor(PREDICTOR.network)._threads._max_workers == 3
    assert batching.BatchPredictor(PREDICTOR.network, threads=5)._threads._max_workers == 5


def test_no_image_is_no_answer():
    class_logits, masks = PREDICTOR(IMAGES[:0])
    assert class_logits.shape == (0, 10) and masks.shape == (0, *SPEC.mask_shape)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 28, 28, 3), np.uint8), np.zeros((2, 32, 32, 3)), IMAGES[0]]
)
def test_other_images_are_refused_by_name(images):
    with pytest.raises(InputError, match="reads uint8"):
        PREDICTOR(images)
