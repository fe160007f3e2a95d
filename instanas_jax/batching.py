"""Batches with real skipping: images of one architecture together, the others one by one.

Images whose masks agree share every switch, so they run as chunks of `CHUNK` through one program;
images left over run alone through another. Two shapes are compiled, whatever the size of the batch
and the mixture of masks, and the chunks are shared out among threads, one call on each.

Chosen by measurement (MobileNetV2 at width 1, 32 pixels, one thread): an image takes 3.3 ms alone,
3.0 in a chunk of 4, 3.1 in one of 8 and 3.4 in one of 16, whose layers leave the nearest caches.
Grouping images path by path within each cell, whatever else their masks hold, could at best win
that tenth back for images with masks of their own, and pays for it by gathering and scattering
every cell's input and output.
"""

import concurrent.futures
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from instanas_jax import environment, inference
from instanas_jax.errors import InputError

CHUNK = 8
# More images than this take less time as a chunk that is not full than one by one.
_WORTH_PADDING = 5
_Program = Callable[[np.ndarray, np.ndarray], jax.Array]


class BatchPredictor:
    """Answers batches of images, each under its own architecture.

    Args:
      network: from `inference.deploy`.
      threads: programs at a time; as many as the process has processors by default. XLA's own pool
        should have as many (`environment.configure_cpu`), or programs wait for each other.
    """

    def __init__(self, network: inference.Network, *, threads: int | None = None):
        self.network = network
        self._threads = concurrent.futures.ThreadPoolExecutor(
            threads or environment.usable_processors()
        )
        decide, answer = jax.jit(network.decide), jax.jit(network.answer)
        weights = network.weights
        self._decide: _Program = lambda images, _: decide(weights, images)
        self._answer: _Program = lambda images, mask: answer(weights, images, mask)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Answers uint8 images [B, H, W, 3]; any B.

        Returns:
          class_logits [B, K] and the masks [B, L, O] of the controller.

        Raises:
          InputError: the images have another shape or type.
        """
        self._check(images)
        masks = self.decide(images)
        return self.answer(images, masks), masks

    def decide(self, images: np.ndarray) -> np.ndarray:
        """Greedy masks [B, L, O] of uint8 images [B, H, W, 3]."""
        if self.network.settled.everything:
            mask = self.network.settled.on.astype(np.float32)
            return np.broadcast_to(mask, (len(images), *mask.shape))
        nothing = np.zeros(0, np.float32)
        chunks = [
            (np.arange(first, min(first + CHUNK, len(images))), nothing)
            for first in range(0, len(images), CHUNK)
        ]
        return self._run(self._decide, images, chunks, self.network.spec.mask_shape)

    def answer(self, images: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """Class logits [B, K] of uint8 images under masks [B, L, O] that agree with whatever the
        controller has settled."""
        chunks = list(chunks_of(masks))
        return self._run(self._answer, images, chunks, (self.network.spec.num_classes,))

    def _run(
        self,
        program: _Program,
        images: np.ndarray,
        chunks: list[tuple[np.ndarray, np.ndarray]],
        shape: tuple[int, ...],
    ) -> np.ndarray:
        """A program's answers [B, *shape] about all images, chunk by chunk, on all threads."""
        answers = np.zeros((len(images), *shape), np.float32)

        def run(chunk: tuple[np.ndarray, np.ndarray]) -> None:
            places, mask = chunk
            size = 1 if len(places) == 1 else CHUNK
            # A chunk that is not full repeats its last image.
            padded = np.resize(places, size)
            padded[len(places) :] = places[-1]
            answers[places] = np.asarray(program(images[padded], mask))[: len(places)]

        for finished in [self._threads.submit(run, chunk) for chunk in chunks]:
            finished.result()
        return answers

    def _check(self, images: np.ndarray) -> None:
        size = self.network.spec.image_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise InputError(
                f"images are {images.dtype} {list(images.shape)}: this network reads uint8 "
                f"[B, {size}, {size}, 3]"
            )


def chunks_of(masks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shares images out by their masks [B, L, O].

    Yields:
      Places in the batch and the mask they share: `CHUNK` places, or one. What is left of a group
      after its full chunks is one more chunk if it fills more than `_WORTH_PADDING`, else images
      alone.
    """
    flattened = np.packbits(masks.reshape(len(masks), math.prod(masks.shape[1:])) > 0.5, axis=1)
    _, group_of = np.unique(flattened, axis=0, return_inverse=True)
    order = np.argsort(group_of, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1):
        for first in range(0, len(places), CHUNK):
            chunk = places[first : first + CHUNK]
            if len(chunk) > _WORTH_PADDING:
                yield chunk, masks[chunk[0]]
            else:
                yield from (
                    (chunk[index : index + 1], masks[chunk[0]]) for index in range(len(chunk))
                )
