"""What a split of a data set is to the programs that use it: in memory, or read as it is needed."""

import dataclasses
import enum
from collections.abc import Generator, Iterable
from typing import Protocol

import numpy as np


class Stream(enum.IntEnum):
    """Tells apart the uses of a seed, so that equal seeds never mean equal draws."""

    VALIDATION = 0
    TEST = 1
    ORDER = 2
    CROP = 3


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Randomness that is a pure function of a seed and what it is for."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def check_labels(labels: Iterable[int], *, num_classes: int) -> None:
    """ValueError if an image is of no class: nobody could answer it, and nothing else tells."""
    strange = [label for label in labels if not 0 <= label < num_classes]
    if strange:
        raise ValueError(f"label {strange[0]} of an image, but {num_classes} class names")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which images one process reads for one batch.

    Attributes:
      indices: [b] of the images in their split; may be empty.
      seed: of random crops, for images that are cropped on the host.
      positions: [b] of the images in the whole run, so that a crop is a pure function of seed and
        position; None for the crop of evaluation.
    """

    indices: np.ndarray
    seed: int = 0
    positions: np.ndarray | None = None


class Schedule(Protocol):
    """The rows of batch after batch, each on demand; can be pickled."""

    def __len__(self) -> int: ...

    def __getitem__(self, batch: int, /) -> Rows: ...


class Images(Protocol):
    """The images of a split and their classes."""

    def __len__(self) -> int: ...

    @property
    def image_size(self) -> int:
        """Height, and width, of an image in pixels."""
        ...

    def take(self, indices: np.ndarray) -> "ImageSet":
        """A few images [n], as evaluation sees them."""
        ...

    def read(self, schedule: Schedule) -> Generator["ImageSet", None, None]:
        """The images of batch after batch; closing the generator frees what reads ahead."""
        ...


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images and their classes, in memory."""

    images: np.ndarray  # [N, H, W, 3] uint8
    labels: np.ndarray  # [N] int32

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        return self.images.shape[1]

    def take(self, indices: np.ndarray) -> "ImageSet":
        return ImageSet(self.images[indices], self.labels[indices])

    def read(self, schedule: Schedule) -> Generator["ImageSet", None, None]:
        return (self.take(schedule[batch].indices) for batch in range(len(schedule)))
