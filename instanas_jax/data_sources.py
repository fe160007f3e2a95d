"""Where images come from: prepared TFDS folders, scikit-learn's digits, and a synthetic set."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from instanas_jax import decoding, image_sets, prepared, streaming
from instanas_jax.errors import InputError
from instanas_jax.image_sets import Images, ImageSet


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set of which any images can be had; mean and std are of pixels in [0, 1]."""

    name: str
    class_names: tuple[str, ...]  # [K]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train_size: int
    test_size: int
    read: Callable[[str, np.ndarray], Images]  # ("train" or "test", indices [N])


# Means and deviations of the training images, as customary for the sets.
_CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
_IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NAMES = (*_CIFAR_STATISTICS, "imagenet2012", "digits", "synthetic")


def open_source(
    name: str, data_dir: str | None = None, *, image_size: int = 224, workers: int = 0
) -> Source:
    """The source of that name; see `data.load`.

    Raises:
      InputError: it is unknown, absent or unreadable.
    """
    if name in _CIFAR_STATISTICS:
        return tfds_source(name, data_dir, *_CIFAR_STATISTICS[name])
    if name == "imagenet2012":
        return imagenet(data_dir, image_size=image_size, workers=workers)
    if name == "digits":
        return digits()
    if name == "synthetic":
        return synthetic()
    raise InputError(f"unknown data set {name!r}; choose one of {', '.join(NAMES)}")


def tfds_source(
    name: str,
    data_dir: str | None,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Source:
    """A TFDS image classification set that is read into memory.

    Args:
      name: the TFDS name; the splits must be `train` and `test`, the images all of one size.
      data_dir: see `prepared.open_prepared`.
      mean: per channel, of pixels scaled to [0, 1].
      std: likewise.

    Raises:
      InputError: the set is not in the folder, or cannot be read; the latter also while reading.
    """
    opened = prepared.open_prepared(name, data_dir, ("train", "test"))

    def read(split: str, indices: np.ndarray) -> ImageSet:
        try:
            records = opened.splits[split].__getitems__(indices.tolist()) if len(indices) else []
            # A fifth quicker than decoding inside TFDS; threads do not help further.
            images = [np.asarray(decoding.decode(record["image"])) for record in records]
            labels = [int(record["label"]) for record in records]
            image_sets.check_labels(labels, num_classes=len(opened.class_names))
            return _image_set(images, labels)
        except Exception as error:
            raise opened.unreadable(error) from error

    sizes = (len(opened.splits["train"]), len(opened.splits["test"]))
    return Source(name, opened.class_names, mean, std, *sizes, read)


def imagenet(data_dir: str | None, *, image_size: int, workers: int) -> Source:
    """ImageNet of 2012, never in memory; TFDS's `validation` split is the test split here.

    The images that the challenge published for testing have no public labels. As the 50,000 of its
    validation are what papers report on, nothing may be selected by them.

    Args:
      data_dir: see `prepared.open_prepared`, of which the errors are as well.
      image_size: side in pixels to which images are cropped and scaled.
      workers: processes that decode; 0 for threads of this one.
    """
    opened = prepared.open_prepared("imagenet2012", data_dir, ("train", "validation"))
    splits = {"train": "train", "test": "validation"}

    def read(split: str, indices: np.ndarray) -> streaming.StreamedImages:
        return streaming.StreamedImages(
            name=f"{opened.name}, split {splits[split]}",
            records=opened.splits[splits[split]],
            indices=indices,
            num_classes=len(opened.class_names),
            image_size=image_size,
            workers=workers,
        )

    sizes = (len(opened.splits["train"]), len(opened.splits["validation"]))
    return Source(opened.name, opened.class_names, *_IMAGENET_STATISTICS, *sizes, read)


def digits(*, image_size: int = 32, test_size: int = 450) -> Source:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn carries (UCI, Alpaydin 1998).

    Values 0 to 16 are scaled to 0 to 255, enlarged bilinearly and repeated to three channels.
    scikit-learn's stratified split with random_state 0 sets `test_size` images apart.

    Args:
      image_size: side in pixels.
      test_size: number of test images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    small = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    large = [
        np.asarray(
            Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BILINEAR)
        )
        for image in small
    ]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    labels = bunch.target.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_size, stratify=labels, random_state=0
    )
    class_names = tuple(str(name) for name in bunch.target_names)
    return in_memory(
        "digits",
        class_names,
        ImageSet(images, labels).take(np.asarray(train)),
        ImageSet(images, labels).take(np.asarray(test)),
    )


def synthetic(
    *,
    train_size: int = 512,
    test_size: int = 128,
    image_size: int = 32,
    num_classes: int = 10,
    noise: float = 24.0,
    seed: int = 0,
) -> Source:
    """A small learnable set for tests: each class is a smooth colour pattern under noise.

    Args:
      train_size: number of training images; classes take turns.
      test_size: number of test images.
      image_size: side in pixels.
      num_classes: K.
      noise: standard deviation of the noise in grey levels of 255.
      seed: decides patterns and noise.
    """
    rng = np.random.default_rng(seed)
    coarse = rng.integers(32, 224, (num_classes, 4, 4, 3), dtype=np.uint8)
    size = (image_size, image_size)
    patterns = np.stack(
        [np.asarray(Image.fromarray(c).resize(size, Image.Resampling.BILINEAR)) for c in coarse]
    )

    def draw(count: int) -> ImageSet:
        labels = np.arange(count, dtype=np.int32) % num_classes
        noisy = patterns[labels] + rng.normal(0, noise, (count, *size, 3))
        return ImageSet(np.clip(np.round(noisy), 0, 255).astype(np.uint8), labels)

    class_names = tuple(f"class_{index}" for index in range(num_classes))
    return in_memory("synthetic", class_names, draw(train_size), draw(test_size))


def in_memory(name: str, class_names: tuple[str, ...], train: ImageSet, test: ImageSet) -> Source:
    """A source over arrays; mean and std are measured on all of `train`."""
    pixels = train.images.reshape(-1, 3) / 255.0
    mean, std = pixels.mean(axis=0), pixels.std(axis=0)
    splits = {"train": train, "test": test}
    return Source(
        name=name,
        class_names=class_names,
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        train_size=len(train),
        test_size=len(test),
        read=lambda split, indices: splits[split].take(indices),
    )


def _image_set(images: list[np.ndarray], labels: list[int]) -> ImageSet:
    stacked = np.stack(images) if images else np.zeros((0, 0, 0, 3), np.uint8)
    return ImageSet(stacked, np.array(labels, np.int32))
