"""Data sets in memory, and the batches drawn from them.

Batches are addressed by position: batch i is a pure function of (seed, i), so that a resumed run
sees exactly the images the interrupted one would have seen.
"""

import dataclasses
from collections.abc import Iterator
from typing import TypedDict

import numpy as np

from instanas_jax import data_sources
from instanas_jax.data_sources import ImageSet, Source
from instanas_jax.errors import InputError

# Tell apart the uses of a seed, so that equal seeds never mean equal permutations.
_VALIDATION_STREAM, _TEST_STREAM, _ORDER_STREAM = range(3)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images of three disjoint splits; mean and std are of pixels scaled to [0, 1]."""

    name: str
    class_names: tuple[str, ...]  # [K]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Height, and width, of an image in pixels."""
        return self.train.images.shape[1]


class Batch(TypedDict):
    image: np.ndarray  # [B, H, W, 3] uint8
    label: np.ndarray  # [B] int32
    weight: np.ndarray  # [B] float32: 1 for a real image, 0 for padding


def load(
    name: str,
    *,
    data_dir: str | None = None,
    validation_size: int,
    split_seed: int = 0,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> Dataset:
    """Reads a data set into memory; never downloads one.

    Args:
      name: one of `data_sources.NAMES`.
      data_dir: folder of prepared TFDS data sets; by default TFDS_DATA_DIR, else
        `~/tensorflow_datasets`. Unused by the sets that need no files.
      validation_size: images cut from the training split; the test split is never touched.
      split_seed: decides which images those are, together with their number and nothing else.
      train_limit: keep at most this many of the remaining training images. A smaller limit keeps
        a subset of what a larger one keeps, and the validation images stay the same.
      test_limit: likewise for the test split.

    Raises:
      InputError: the name is unknown, a size is out of range, or the set is absent or unreadable.
    """
    return split(
        data_sources.open_source(name, data_dir),
        validation_size=validation_size,
        split_seed=split_seed,
        train_limit=train_limit,
        test_limit=test_limit,
    )


def split(
    source: Source,
    *,
    validation_size: int,
    split_seed: int = 0,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> Dataset:
    """Reads a source as `load` does, for sources that are not in the list of names."""
    if not 0 <= validation_size < source.train_size:
        raise InputError(
            f"validation_size is {validation_size}, but {source.name} has {source.train_size} "
            f"training images; choose 0 to {source.train_size - 1}"
        )
    for limit_name, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
        if limit is not None and limit < 1:
            raise InputError(f"{limit_name} is {limit}; choose 1 or more, or leave it out")
    shuffled_train = _permutation(source.train_size, split_seed, _VALIDATION_STREAM)
    shuffled_test = _permutation(source.test_size, split_seed, _TEST_STREAM)
    return Dataset(
        name=source.name,
        class_names=source.class_names,
        train=source.read("train", np.sort(shuffled_train[validation_size:][:train_limit])),
        validation=source.read("train", np.sort(shuffled_train[:validation_size])),
        test=source.read("test", np.sort(shuffled_test[:test_limit])),
        mean=source.mean,
        std=source.std,
    )


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Whole batches in one pass over the images; InputError if there is not even one."""
    if not 1 <= batch_size <= num_examples:
        raise InputError(
            f"batch_size is {batch_size}, but there are {num_examples} images; "
            f"choose 1 to {num_examples}"
        )
    return num_examples // batch_size


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order `[num_examples]` of an epoch's images: a pure function of (seed, epoch)."""
    return _permutation(num_examples, seed, _ORDER_STREAM, epoch)


def train_batches(
    images: ImageSet,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    share: slice = slice(None),
) -> Iterator[Batch]:
    """Shuffled batches `start_step` to `start_step + num_steps - 1`, all full.

    The last partial batch of an epoch is dropped; as the order changes with each epoch, no image
    is left out for good.

    Raises:
      InputError: batch_size is not between 1 and the number of images.
    """
    # Checked here, not in the generator, so that a mistake shows at the call.
    epoch_steps = steps_per_epoch(len(images), batch_size)

    def batches() -> Iterator[Batch]:
        order, order_epoch = np.empty(0, np.int64), -1
        for step in range(start_step, start_step + num_steps):
            epoch, position = divmod(step, epoch_steps)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(len(images), seed=seed, epoch=epoch), epoch
            chosen = order[position * batch_size : (position + 1) * batch_size][share]
            yield _batch(images, chosen, len(chosen))

    return batches()


def eval_batches(
    images: ImageSet, *, batch_size: int, share: slice = slice(None)
) -> Iterator[Batch]:
    """Every image exactly once, in order; the last batch is padded with zeros of weight 0."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; choose 1 or more")
    rows = len(range(*share.indices(batch_size)))
    return (
        _batch(images, np.arange(first, min(first + batch_size, len(images)))[share], rows)
        for first in range(0, len(images), batch_size)
    )


def _batch(images: ImageSet, chosen: np.ndarray, batch_size: int) -> Batch:
    missing = batch_size - len(chosen)

    def padded(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array

    return Batch(
        image=padded(images.images[chosen]),
        label=padded(images.labels[chosen]),
        weight=padded(np.ones(len(chosen), np.float32)),
    )


def _permutation(count: int, seed: int, *stream: int) -> np.ndarray:
    sequence = np.random.SeedSequence(seed, spawn_key=stream)
    return np.random.default_rng(sequence).permutation(count)
