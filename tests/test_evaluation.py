"""Answers over a split, and batch statistics under one architecture."""

import jax
import numpy as np
import pytest

from experiments import evaluation
from instanas_jax import augment, feeding, parallel, supernet, train_state
from instanas_jax.image_sets import ImageSet
from instanas_jax.search_space import preset, uniform_architecture
from instanas_jax.stage import Setting
from tests.networks import as_if_trained

SPEC = preset("tiny", num_classes=10)
BATCH = 32
SETTING = Setting(
    SPEC,
    mean=(0.4, 0.4, 0.4),
    std=(0.3, 0.3, 0.3),
    augmentation=augment.Augmentation(pad=4, flip=True, cutout=16),
    seed=0,
    lowering="shifted",
    axis_name=parallel.axis_name(),
)


def make_images() -> ImageSet:
    rng = np.random.default_rng(0)
    shape = (BATCH, SPEC.image_size, SPEC.image_size, 3)
    return ImageSet(
        rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, 10, BATCH, dtype=np.int32)
    )


def make_state() -> train_state.TrainState:
    """On the host, with networks in which every path has a say."""
    state = train_state.create(jax.random.key(0), SPEC)
    return jax.device_get(state.replace(supernet=as_if_trained(state.supernet)))


def test_recalibrated_evaluation_is_training_mode_on_the_same_images():
    """Folded weights see the batch's own statistics: same answers, where the running ones give
    others."""
    images, architecture = make_images(), uniform_architecture(SPEC, 1)
    evaluate = evaluation.Evaluator(SETTING, batch_size=BATCH)
    state = make_state()
    batches = list(feeding.train_batches(images, batch_size=BATCH, seed=0, num_steps=1))
    recalibrated = evaluate.recalibrated(state, batches, architecture=architecture)

    class_logits, _ = supernet.apply_train(
        SPEC,
        state.supernet,
        augment.normalise(images.images, mean=SETTING.mean, std=SETTING.std),
        np.broadcast_to(architecture, (BATCH, *SPEC.mask_shape)),
        lowering="shifted",
    )
    log_probabilities = np.asarray(jax.nn.log_softmax(class_logits))
    expected = -log_probabilities[np.arange(BATCH), images.labels]
    answers = evaluate(recalibrated, images, architecture=architecture)
    np.testing.assert_allclose(answers.loss, expected, rtol=5e-3)
    before = evaluate(state, images, architecture=architecture)
    assert np.abs(before.loss - expected).max() > 0.05


def test_statistics_are_the_mean_over_batches():
    images, architecture = make_images(), uniform_architecture(SPEC, 0)
    evaluate = evaluation.Evaluator(SETTING, batch_size=BATCH)
    state = make_state()
    halves = list(feeding.train_batches(images, batch_size=BATCH // 2, seed=0, num_steps=2))

    def statistics(batches):
        state_of = evaluate.recalibrated(state, batches, architecture=architecture)
        return jax.tree.leaves(state_of.supernet["batch_stats"])

    for both, first, second in zip(
        statistics(halves), statistics(halves[:1]), statistics(halves[1:]), strict=True
    ):
        np.testing.assert_allclose(both, (first + second) / 2, rtol=1e-5, atol=1e-6)


def test_some_paths_answer_as_they_do_among_all():
    """And the others, whose weights spoil what they touch, are not computed."""
    images, state = make_images(), make_state()
    paths = np.zeros(SPEC.mask_shape, bool)
    paths[:, [1, 4]] = True
    few = evaluation.Evaluator(SETTING, batch_size=BATCH, paths=paths)
    batches = list(feeding.train_batches(images, batch_size=BATCH, seed=0, num_steps=1))
    spoilt = jax.tree.map(np.copy, state.supernet)
    for name, cell in spoilt["params"].items():
        if name.startswith("cell"):
            cell["project_mbconv_k5_e6"]["kernel"][:] = np.nan

    for architecture in (paths.astype(np.float32), uniform_architecture(SPEC, 1)):
        expected = evaluation.Evaluator(SETTING, batch_size=BATCH)(
            state, images, architecture=architecture
        )
        answers = few(state.replace(supernet=spoilt), images, architecture=architecture)
        np.testing.assert_allclose(answers.loss, expected.loss, rtol=1e-4)
        np.testing.assert_array_equal(answers.mask, expected.mask)
    recalibrated = few.recalibrated(state, batches, architecture=architecture)
    before, after = (one.supernet["batch_stats"]["cell_02"] for one in (state, recalibrated))
    for name, is_same in (("project_mbconv_k5_e6", True), ("project_mbconv_k3_e3", False)):
        assert np.array_equal(before[name]["mean"], after[name]["mean"]) == is_same
    for call in (few, lambda *_, **options: few.recalibrated(state, batches, **options)):
        with pytest.raises(ValueError, match="does not compute"):
            call(state, images, architecture=uniform_architecture(SPEC, 2))


def test_batches_of_an_evaluation_have_arrived_as_those_of_training_have(monkeypatch):
    """Or a program's temporaries are mapped anew at each batch: see `feeding.to_devices`."""
    arrived, to_devices = [], feeding.to_devices
    monkeypatch.setattr(
        feeding, "to_devices", lambda batch: arrived.append(batch) or to_devices(batch)
    )
    evaluate = evaluation.Evaluator(SETTING, batch_size=BATCH // 2)
    evaluate(make_state(), make_images(), architecture=uniform_architecture(SPEC, 1))
    assert [len(batch["image"]) for batch in arrived] == [BATCH // 2] * 2
