"""Images that do not fit into memory: read, decoded and cropped a few batches ahead of their use.

Grain runs the threads and processes. What a batch holds is in its schedule, a pure function of the
batch's number, so that the pipeline has no state to save, and neither the number of processes nor
the step at which it starts changes a batch.
"""

import atexit
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Generator
from multiprocessing import connection
from typing import Any

import numpy as np

from instanas_jax import decoding, environment, errors, image_sets
from instanas_jax.errors import InputError
from instanas_jax.image_sets import ImageSet, Rows, Schedule, Stream

# Batches in memory at once: a batch of 250 images of 224 pixels has 38 MB.
_MAX_THREADS = 16

_OPEN: weakref.WeakSet[Generator[ImageSet, None, None]] = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class StreamedImages:
    """Images of a split, decoded whenever they are read.

    Training sees random parts of them, evaluation the middle; see `decoding`.

    Attributes:
      name: of data set and split, for messages.
      records: a sequence with random access that can be pickled; a record's `image` is an encoded
        file, its `label` an integer.
      indices: [N] of the records that make up the split.
      num_classes: labels are 0 to one less.
      image_size: height, and width, in pixels.
      workers: processes that decode; 0 for threads of this one. Grain's settings are absl flags,
        which it reads before it starts processes: who parses no flags must call
        `absl.flags.FLAGS.mark_as_parsed` first.
    """

    name: str
    records: Any
    indices: np.ndarray
    num_classes: int
    image_size: int
    workers: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: np.ndarray) -> ImageSet:
        """A few images [n], as evaluation sees them; InputError if one cannot be read."""
        return self.decode(Rows(indices))

    def read(self, schedule: Schedule) -> Generator[ImageSet, None, None]:
        """The images of batch after batch; InputError if one cannot be read.

        Processes, which are started anew by each call, end with the generator, or with this
        process.
        """
        batches = self._read(schedule)
        _OPEN.add(batches)
        return batches

    def _read(self, schedule: Schedule) -> Generator[ImageSet, None, None]:
        if not len(schedule):
            return
        workers = min(self.workers, len(schedule))
        iterator = iter(_pipeline(_Batches(self, schedule), workers))
        with contextlib.closing(iterator):
            for _ in range(len(schedule)):
                try:
                    # Copies, so that the memory which processes share is freed here and now.
                    images, labels = map(np.array if workers else np.asarray, next(iterator))
                except RuntimeError as error:
                    if not workers:
                        raise
                    raise InputError(
                        f"a process that decodes {self.name} has ended ({error}): if memory or "
                        "/dev/shm is short, lower --data_workers"
                    ) from error
                yield ImageSet(images, labels)

    def decode(self, rows: Rows) -> ImageSet:
        """The images of one batch, here and now; InputError if one cannot be read."""
        images = np.empty((len(rows.indices), self.image_size, self.image_size, 3), np.uint8)
        labels = np.empty(len(rows.indices), np.int32)
        for row, record in enumerate(self.indices[rows.indices].tolist()):
            try:
                example = self.records[record]
                image = decoding.decode(example["image"])
                if rows.positions is None:
                    box = decoding.central_box(*image.size)
                else:
                    crop = (Stream.CROP, int(rows.positions[row]))
                    box = decoding.random_box(*image.size, image_sets.generator(rows.seed, *crop))
                images[row] = decoding.scale(image, box, self.image_size)
                labels[row] = example["label"]
                image_sets.check_labels([labels[row]], num_classes=self.num_classes)
            except Exception as error:  # Pillow's and TFDS's readers raise many types.
                raise _undecodable(self.name, record, error) from error
        return ImageSet(images, labels)


@dataclasses.dataclass(frozen=True)
class _Batches:
    """The batches of a schedule as a sequence for Grain; decodes those asked for."""

    images: StreamedImages
    schedule: Schedule

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        decoded = self.images.decode(self.schedule[index])
        return decoded.images, decoded.labels


def _pipeline(batches: _Batches, workers: int) -> Any:
    """Grain's data set of these batches, in order, read ahead by threads or by processes."""
    # Imported here, as runs whose images are in memory do without it.
    import grain

    # A process decodes one batch while another waits in its queue.
    threads = 1 if workers else min(_MAX_THREADS, environment.usable_processors())
    read_ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(read_ahead)
    if not workers:
        return dataset
    return dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_start_worker
    )


def _start_worker(index: int, count: int) -> None:
    """In each process: ends it with its parent, whatever ends that."""
    del index, count
    # Ctrl-C reaches every process of a terminal; the parent's cleaning up ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A few of ImageNet's files have damaged descriptions beside good pixels.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@atexit.register
def _close_all() -> None:
    """What is open when Python ends would else be torn down after the modules that it needs."""
    for batches in list(_OPEN):
        batches.close()


def _undecodable(name: str, record: int, error: Exception) -> InputError:
    return InputError(
        f"record {record} of {name} cannot be decoded ({errors.reason(error)}): prepare the data "
        "set again"
    )
