"""Augmentation against an image-by-image numpy model and hand-worked values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instanas_jax import augment
from instanas_jax.augment import Augmentation

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
PLAIN = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # leaves pixel values alone
NONE, CIFAR = Augmentation(), Augmentation(pad=4, flip=True, cutout=16)


def random_images(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    # From 1 on, so that a zero can only come from padding.
    return np.random.default_rng(0).integers(1, 256, (count, height, width, 3), dtype=np.uint8)


def keys(count: int, seed: int = 0) -> jax.Array:
    return augment.image_keys(jax.random.key(seed), 0, count)


def crops(image: np.ndarray, pad: int, flip: bool) -> dict[tuple[int, int, bool], np.ndarray]:
    """Every crop (and mirrored crop) that padding by `pad` allows."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    found = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            window = padded[top : top + height, left : left + width]
            found[top, left, False] = window
            if flip:
                found[top, left, True] = window[:, ::-1]
    return found


def test_normalise_by_hand():
    # Raw 255 is 1.0: (1 - 0.5)/0.25 = 2, (1 - 0.4)/0.2 = 3, (1 - 0.3)/0.1 = 7; raw 0: -2, -2, -3.
    images = np.array([[[[255, 255, 255], [0, 0, 0]]]], np.uint8)
    result = augment.normalise(images, mean=MEAN, std=STD)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result[0, 0], [[2, 3, 7], [-2, -2, -3]], rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (6, 9)])
def test_pad_crop_and_flip_give_every_window_and_nothing_else(shape: tuple[int, int]):
    count, pad = 400, 1
    image = random_images(1, *shape)[0]
    result = augment.augment_and_normalise(
        keys(count),
        np.broadcast_to(image, (count, *image.shape)),
        augmentation=Augmentation(pad=pad, flip=True),
        **PLAIN,
    )
    named = {window.tobytes(): name for name, window in crops(image, pad, flip=True).items()}
    seen = [named[np.round(np.asarray(r)).astype(np.uint8).tobytes()] for r in result]
    # 18 windows, 400 draws: each is expected 22 times, and missing one has odds under 1e-8.
    assert len(set(seen)) == 18
    assert 150 < sum(mirrored for _, _, mirrored in seen) < 250


def test_padding_is_black_and_cutout_is_the_mean_colour():
    count = 64
    white = np.full((count, 8, 8, 3), 255, np.uint8)
    run = functools.partial(augment.augment_and_normalise, keys(count), white, mean=MEAN, std=STD)
    padded = np.asarray(run(augmentation=Augmentation(pad=2)))
    cut = np.asarray(run(augmentation=Augmentation(cutout=4)))
    # As in the test of normalise: white is 2, black is -2 in the first channel.
    assert set(np.unique(padded[..., 0].round(4))) == {-2.0, 2.0}
    assert set(np.unique(cut[..., 0].round(4))) == {0.0, 2.0}


@pytest.mark.parametrize("side", [1, 3, 4])
def test_cutout_is_a_square_clipped_at_the_borders(side: int):
    count, size = 600, 6
    result = np.asarray(
        augment.augment_and_normalise(
            keys(count),
            random_images(count, size, size),
            augmentation=Augmentation(cutout=side),
            **PLAIN,
        )
    )
    possible = set()
    for y in range(size):
        for x in range(size):
            mask = np.zeros((size, size), bool)
            top, left = y - side // 2, x - side // 2
            mask[max(top, 0) : top + side, max(left, 0) : left + side] = True
            possible.add(mask.tobytes())
    assert {(image == 0).all(axis=-1).tobytes() for image in result} == possible


def test_draws_of_one_setting_do_not_disturb_another():
    images = random_images(16)
    run = functools.partial(augment.augment_and_normalise, keys(16), images, **PLAIN)
    without = np.asarray(run(augmentation=Augmentation(pad=2, flip=True)))
    with_cutout = np.asarray(run(augmentation=Augmentation(pad=2, flip=True, cutout=3)))
    cut = (with_cutout == 0).all(axis=-1, keepdims=True)
    np.testing.assert_array_equal(with_cutout, np.where(cut, 0, without))


@pytest.mark.parametrize("augmentation", [NONE, Augmentation(pad=2), CIFAR])
def test_an_image_ignores_its_neighbours_and_the_number_of_devices(augmentation: Augmentation):
    images, key = random_images(12, 32, 32), jax.random.key(7)
    run = jax.jit(
        functools.partial(
            augment.augment_and_normalise, augmentation=augmentation, mean=MEAN, std=STD
        )
    )
    whole = run(augment.image_keys(key, 100, 12), images)
    halves = [
        run(augment.image_keys(key, 100 + first, 6), images[first : first + 6]) for first in (0, 6)
    ]
    np.testing.assert_array_equal(whole, np.concatenate(halves))


def test_image_keys_are_distinct_and_take_a_traced_index():
    make = jax.jit(lambda first: augment.image_keys(jax.random.key(0), first, 3))
    traced, direct = make(40), augment.image_keys(jax.random.key(0), 38, 5)
    np.testing.assert_array_equal(jax.random.key_data(traced), jax.random.key_data(direct[2:]))
    assert len(np.unique(jax.random.key_data(direct), axis=0)) == 5


def test_none_changes_nothing_but_the_scale():
    images = random_images(3)
    result = augment.augment_and_normalise(keys(3), images, augmentation=NONE, mean=MEAN, std=STD)
    np.testing.assert_array_equal(result, augment.normalise(images, mean=MEAN, std=STD))


def test_cut_mix_lays_a_rectangle_of_the_neighbour_and_counts_what_is_left():
    count, size = 401, 8
    # An image of its own number tells whose each pixel is.
    images = np.broadcast_to(
        np.arange(count, dtype=np.float32)[:, None, None, None], (count, size, size, 3)
    )
    labels = np.arange(count, dtype=np.int32)
    mixed, others, own = map(
        np.asarray, augment.cut_mix(keys(count), images, labels, probability=0.75)
    )
    neighbours = np.where(labels == count - 1, labels, labels ^ 1)
    np.testing.assert_array_equal(others, neighbours)
    for image in range(count - 1):
        foreign = mixed[image, ..., 0] == neighbours[image]
        assert ((mixed[image] == image) | foreign[..., None]).all()
        rows, columns = foreign.any(axis=1), foreign.any(axis=0)
        assert (foreign == rows[:, None] & columns[None]).all()
        # One stretch each: a rectangle.
        assert np.diff(np.flatnonzero(rows)).max(initial=1) == 1
        assert np.diff(np.flatnonzero(columns)).max(initial=1) == 1
        assert own[image] == pytest.approx(1.0 - foreign.mean())
    np.testing.assert_array_equal(mixed[-1], images[-1])


def test_cut_mix_takes_half_of_an_image_on_average_before_clipping():
    """An area of E[u] = 1/2 around a centre anywhere; rows and columns are drawn apart."""
    count, size = 4_000, 8
    images = np.broadcast_to(np.arange(count)[:, None, None, None] % 2, (count, size, size, 3))
    mixed, _, own = map(
        np.asarray,
        augment.cut_mix(
            keys(count), images.astype(np.float32), np.zeros(count, np.int32), probability=0.75
        ),
    )
    sides = np.round(np.sqrt((np.arange(10_000) + 0.5) / 10_000) * size).astype(int)
    covered = [
        np.mean(
            [max(0, min(c - side // 2 + side, size) - max(c - side // 2, 0)) for c in range(size)]
        )
        for side in range(size + 1)
    ]
    expected = 1.0 - 0.75 * np.mean(np.square(np.take(covered, sides))) / size**2
    assert own.mean() == pytest.approx(expected, abs=0.015)
    foreign = mixed[..., 0] != images[..., 0]
    some = foreign.any(axis=(1, 2))
    assert some.mean() == pytest.approx(0.75, abs=0.03)
    rows, columns = (
        (foreign.any(axis=axis) * np.arange(size)).sum(axis=1)[some] for axis in (2, 1)
    )
    # Both grow with the side, but for one side they are independent.
    lengths = foreign.any(axis=2).sum(axis=1)[some]
    middle = lengths == size // 2
    assert abs(np.corrcoef(rows[middle], columns[middle])[0, 1]) < 0.3


def test_cut_mix_by_halves_of_even_size_is_that_of_the_whole():
    images, labels, key = random_images(12, 32, 32), np.arange(12), jax.random.key(7)
    run = jax.jit(functools.partial(augment.cut_mix, probability=1.0))
    whole = run(augment.image_keys(key, 0, 12), images, labels)
    parts = [
        run(augment.image_keys(key, first, 6), images[first : first + 6], labels[first : first + 6])
        for first in (0, 6)
    ]
    joined = map(np.concatenate, zip(*parts, strict=True))
    for expected, found in zip(whole, joined, strict=True):
        np.testing.assert_array_equal(found, expected)
