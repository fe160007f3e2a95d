"""Augmentation, mixing and normalisation on the device, in jit; each image draws by its own key."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Which random changes an image undergoes.

    Attributes:
      pad: pixels of zero padding on each side before a random crop back to the original size.
      flip: whether to mirror left and right with probability one half.
      cutout: side in pixels of a square set to the mean colour; 0 for none.
    """

    pad: int = 0
    flip: bool = False
    cutout: int = 0


def image_keys(key: jax.Array, first_index: jax.typing.ArrayLike, count: int) -> jax.Array:
    """Keys `[count]` of the images numbered from `first_index` on.

    Each key depends on the image's number alone, so an image draws the same on any number of
    devices and after a resume.

    Args:
      key: a typed key (`jax.random.key`), the same for the whole run.
      first_index: number of the first image, under 2**32; may be traced.
      count: how many images.
    """
    indices = jnp.asarray(first_index, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def normalise(
    images: jax.Array, *, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> jax.Array:
    """Scales pixels to [0, 1], subtracts the mean and divides by the standard deviation.

    Args:
      images: `[B, H, W, 3]`, values 0 to 255.
      mean: per channel, of pixels scaled to [0, 1].
      std: likewise.

    Returns:
      `[B, H, W, 3]` float32.
    """
    scaled = images.astype(jnp.float32) / 255.0
    return (scaled - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)


def augment_and_normalise(
    keys: jax.Array,
    images: jax.Array,
    *,
    augmentation: Augmentation,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> jax.Array:
    """Pads and crops, flips, normalises, then cuts out, each image by its own key.

    The order is the customary one for CIFAR: padding is raw zero, that is black, while the cut-out
    square is zero after normalisation, that is the mean colour. Its centre is uniform over the
    pixels and the square is clipped at the borders (DeVries and Taylor 2017, arXiv:1708.04552).

    Args:
      keys: `[B]` typed keys, as from `image_keys`.
      images: `[B, H, W, 3]` uint8.
      augmentation: static under jit.
      mean: per channel, of pixels scaled to [0, 1].
      std: likewise.

    Returns:
      `[B, H, W, 3]` float32.
    """
    if augmentation == Augmentation():
        return normalise(images, mean=mean, std=std)
    height, width = images.shape[1:3]
    # Always five draws in fixed places: changing one setting leaves the other draws as they were.
    draws = jax.vmap(lambda key: jax.random.uniform(key, (5,)))(keys)
    shift = _uniform_integer(draws[:, 0:2], 2 * augmentation.pad + 1) - augmentation.pad
    flipped = (draws[:, 2] < 0.5) & augmentation.flip
    cropped = _crop_and_flip(images, shift[:, 0], shift[:, 1], flipped)
    normalised = normalise(cropped, mean=mean, std=std)
    if augmentation.cutout == 0:
        return normalised
    cut_rows = _within(_uniform_integer(draws[:, 3], height), augmentation.cutout, height)
    cut_columns = _within(_uniform_integer(draws[:, 4], width), augmentation.cutout, width)
    cut = cut_rows[:, :, None, None] & cut_columns[:, None, :, None]
    return jnp.where(cut, 0.0, normalised)


def cut_mix(
    keys: jax.Array, images: jax.Array, labels: jax.Array, *, probability: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lays a rectangle of its neighbour in the batch over an image.

    Images 0 and 1 are neighbours, 2 and 3, and so on; batches are shuffled, so any two may meet.
    The last of an odd number has itself: on several devices, each must hold an even number, or what
    an image meets depends on how many they are. The rectangle's sides are those of the image times
    the square root of a number drawn evenly from [0, 1]; its centre is uniform over the pixels, and
    it is clipped at the borders. Source: CutMix (arXiv 1905.04899), section 3.1, with alpha 1.
    Differs from the paper: each image has a rectangle of its own, where all of a batch share one,
    and mixes with its neighbour, where the batch is permuted.

    Args:
      keys: `[B]` typed keys.
      images: `[B, H, W, 3]`, normalised.
      labels: int32 `[B]`.
      probability: that an image is mixed at all.

    Returns:
      Images, their neighbours' labels `[B]`, and what share `[B]` of an image's pixels is its own.
    """
    count, height, width = images.shape[:3]
    neighbour = np.minimum(np.arange(count) ^ 1, count - 1)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (4,)))(keys)
    side = jnp.where(draws[:, 0] < probability, jnp.sqrt(draws[:, 1]), 0.0)
    rows = _within(_uniform_integer(draws[:, 2], height), _rounded(side * height), height)
    columns = _within(_uniform_integer(draws[:, 3], width), _rounded(side * width), width)
    other = rows[:, :, None] & columns[:, None, :]
    mixed = jnp.where(other[..., None], images[neighbour], images)
    return mixed, labels[neighbour], 1.0 - other.mean(axis=(1, 2))


def _rounded(number: jax.Array) -> jax.Array:
    return jnp.round(number).astype(jnp.int32)


def _uniform_integer(draw: jax.Array, bound: int) -> jax.Array:
    """Turns a uniform number in [0, 1) into an integer in [0, bound)."""
    return jnp.floor(draw * bound).astype(jnp.int32)


def _crop_and_flip(
    images: jax.Array, row_shift: jax.Array, column_shift: jax.Array, flipped: jax.Array
) -> jax.Array:
    """Moves the window by the shifts, `[B]` pixels each, reading 0 outside; mirrors where told."""
    count, height, width = images.shape[:3]
    columns = jnp.arange(width)
    rows = jnp.arange(height) + row_shift[:, None]
    columns = jnp.where(flipped[:, None], width - 1 - columns, columns) + column_shift[:, None]
    inside_rows = (rows >= 0) & (rows < height)
    inside_columns = (columns >= 0) & (columns < width)
    # One gather for crop and flip: faster on CPU than one-hot products or selected shifts.
    window = images[
        jnp.arange(count)[:, None, None],
        jnp.clip(rows, 0, height - 1)[:, :, None],
        jnp.clip(columns, 0, width - 1)[:, None, :],
    ]
    inside = inside_rows[:, :, None, None] & inside_columns[:, None, :, None]
    return jnp.where(inside, window, 0)


def _within(centre: jax.Array, side: jax.typing.ArrayLike, size: int) -> jax.Array:
    """`[B, size]`: which positions the interval of `side` pixels, one or `[B]`, about each centre
    covers."""
    sides = jnp.broadcast_to(side, centre.shape)
    first = centre - sides // 2
    position = jnp.arange(size)
    return (position >= first[:, None]) & (position < (first + sides)[:, None])
