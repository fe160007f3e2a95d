"""Data sets, and the batches drawn from them.

Batches are addressed by position: batch i is a pure function of (seed, i), so that a resumed run
sees exactly the images the interrupted one would have seen. No iterator's state is saved: the
number of the step, which every checkpoint has, is all the state there is. It holds as well for
images that are read and cropped as they are needed, with any number of threads and processes.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Generator
from typing import TypedDict

import numpy as np

from instanas_jax import data_sources, image_sets
from instanas_jax.data_sources import Source
from instanas_jax.errors import InputError
from instanas_jax.image_sets import Images, ImageSet, Rows, Schedule, Stream


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images of three disjoint splits; mean and std are of pixels scaled to [0, 1]."""

    name: str
    class_names: tuple[str, ...]  # [K]
    train: Images
    validation: Images
    test: Images
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Height, and width, of an image in pixels."""
        return self.train.image_size


class Batch(TypedDict):
    """A batch of B images, or the share of it that a process reads."""

    image: np.ndarray  # [B, H, W, 3] uint8
    label: np.ndarray  # [B] int32


def load(
    name: str,
    *,
    data_dir: str | None = None,
    validation_size: int,
    split_seed: int = 0,
    train_limit: int | None = None,
    test_limit: int | None = None,
    image_size: int = 224,
    workers: int = 0,
) -> Dataset:
    """Opens a data set, reading it into memory where it fits; never downloads one.

    Args:
      name: one of `data_sources.NAMES`.
      data_dir: folder of prepared TFDS data sets; by default TFDS_DATA_DIR, else
        `~/tensorflow_datasets`. Unused by the sets that need no files.
      validation_size: images cut from the training split; the test split is never touched.
      split_seed: decides which images those are, together with their number and nothing else.
      train_limit: keep at most this many of the remaining training images. A smaller limit keeps
        a subset of what a larger one keeps, and the validation images stay the same.
      test_limit: likewise for the test split.
      image_size: side in pixels to which images of many sizes are cropped and scaled. Unused by
        sets whose images are of one size.
      workers: processes that decode images which are not in memory; 0 for threads of this one.
        Changes no batch.

    Raises:
      InputError: the name is unknown, a size is out of range, or the set is absent or unreadable.
    """
    return split(
        data_sources.open_source(name, data_dir, image_size=image_size, workers=workers),
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
            "training images: choose fewer"
        )
    for limit_name, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
        if limit is not None and limit < 1:
            raise InputError(f"{limit_name} is {limit}; choose 1 or more, or leave it out")
    shuffled_train = _permutation(source.train_size, split_seed, Stream.VALIDATION)
    shuffled_test = _permutation(source.test_size, split_seed, Stream.TEST)
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
    return _permutation(num_examples, seed, Stream.ORDER, epoch)


def train_batches(
    images: Images,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    share: slice = slice(None),
) -> Generator[Batch, None, None]:
    """Shuffled batches `start_step` to `start_step + num_steps - 1`, all full.

    The last partial batch of an epoch is dropped; as the order changes with each epoch, no image
    is left out for good. Closing the generator frees what reads ahead.

    Args:
      batch_size: of the whole batch.
      share: the rows of each batch that this process reads; only they are decoded, and yielded.

    Raises:
      InputError: batch_size is not between 1 and the number of images; while iterating: an image
        cannot be read.
    """
    schedule = train_schedule(
        images,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        num_steps=num_steps,
        share=share,
    )
    return _batches(images, schedule, len(range(batch_size)[share]))


def train_schedule(
    images: Images,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    share: slice = slice(None),
) -> Schedule:
    """Which images stand in the batches of `train_batches`."""
    # Checked here, not when a batch is asked for, so that a mistake shows at the call.
    steps_per_epoch(len(images), batch_size)
    rows = np.arange(batch_size)[share]
    return _Training(len(images), batch_size, rows, seed, start_step, num_steps)


def eval_batches(
    images: Images, *, batch_size: int, share: slice = slice(None)
) -> Generator[Batch, None, None]:
    """Every image exactly once, in order; the last batch is padded with zeros.

    Args:
      batch_size: of the whole batch.
      share: as in `train_batches`; padding is where the whole batch has it.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; choose 1 or more")
    rows = np.arange(batch_size)[share]
    return _batches(images, _Evaluation(len(images), batch_size, rows), len(rows))


def blank_batch(images: Images, *, batch_size: int, share: slice = slice(None)) -> Batch:
    """Padding alone, in the shapes and types of these images' batches; nothing is read."""
    rows = len(range(batch_size)[share])
    size = images.image_size
    nothing = ImageSet(np.zeros((0, size, size, 3), np.uint8), np.zeros(0, np.int32))
    return _batch(nothing, rows)


@dataclasses.dataclass(frozen=True)
class _Training:
    """The schedule of `train_batches`; `rows` are places in the whole batch."""

    num_examples: int
    batch_size: int
    rows: np.ndarray
    seed: int
    start_step: int
    num_steps: int

    def __len__(self) -> int:
        return max(0, self.num_steps)

    def __getitem__(self, batch: int) -> Rows:
        step = self.start_step + batch
        epoch, place = divmod(step, steps_per_epoch(self.num_examples, self.batch_size))
        order = _kept_epoch_order(self.num_examples, self.seed, epoch)
        return Rows(
            order[place * self.batch_size + self.rows],
            seed=self.seed,
            positions=step * self.batch_size + self.rows,
        )


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """The schedule of `eval_batches`; `rows` are places in the whole batch."""

    num_examples: int
    batch_size: int
    rows: np.ndarray

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def __getitem__(self, batch: int) -> Rows:
        indices = batch * self.batch_size + self.rows
        return Rows(indices[indices < self.num_examples])


def _batches(images: Images, schedule: Schedule, rows: int) -> Generator[Batch, None, None]:
    with contextlib.closing(images.read(schedule)) as chosen:
        for part in chosen:
            yield _batch(part, rows)


def _batch(images: ImageSet, rows: int) -> Batch:
    missing = rows - len(images)

    def padded(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array

    return Batch(image=padded(images.images), label=padded(images.labels))


# Two, as threads that read ahead are in two epochs at times.
@functools.lru_cache(maxsize=2)
def _kept_epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    order = epoch_order(num_examples, seed=seed, epoch=epoch)
    order.setflags(write=False)
    return order


def _permutation(count: int, seed: int, *stream: int) -> np.ndarray:
    return image_sets.generator(seed, *stream).permutation(count)
