"""Sums and counts over batches, and writers of scalars to JSONL, CSV and TensorBoard.

An evaluator returns sums and a count rather than means, so that a zero-padded last batch, or a
batch split over devices, counts every image exactly once.
"""

import csv
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from instanas_jax.errors import InputError

COUNT = "count"
Sums = Mapping[str, Any]  # scalars: JAX or numpy arrays, or Python numbers


def weighted_sums(weight: jax.Array, **values: jax.Array) -> dict[str, jax.Array]:
    """Sums each `[B]` value over the images whose weight is not zero.

    Args:
      weight: `[B]`, 1 for a real image and 0 for padding.
      **values: per-image figures, each `[B]`. A NaN in a padded row does not reach the sum.

    Returns:
      Scalars: the weighted sum of each value, and `count`, the sum of the weights.
    """
    sums = {
        name: jnp.sum(jnp.where(weight > 0, weight * value, 0.0)) for name, value in values.items()
    }
    return {**sums, COUNT: jnp.sum(weight)}


def correct_and_count(
    class_logits: jax.Array, labels: jax.Array, weight: jax.Array
) -> dict[str, jax.Array]:
    """The number of correct top-1 answers under the name `accuracy`, and `count`.

    Args:
      class_logits: `[B, K]`.
      labels: `[B]` int.
      weight: `[B]`, 1 for a real image and 0 for padding.
    """
    correct = (jnp.argmax(class_logits, axis=-1) == labels).astype(jnp.float32)
    return weighted_sums(weight, accuracy=correct)


def add(left: Sums, right: Sums) -> dict[str, Any]:
    """Adds two batches' sums, name by name; raises ValueError if their names differ."""
    if left.keys() != right.keys():
        raise ValueError(f"cannot add sums of {sorted(left)} to sums of {sorted(right)}")
    return {name: left[name] + right[name] for name in left}


def mean(sums: Sums) -> dict[str, float]:
    """Divides each sum by `count`; NaN where no image was counted."""
    count = float(sums[COUNT])
    return {
        name: float(total) / count if count else math.nan
        for name, total in sums.items()
        if name != COUNT
    }


class Writer(Protocol):
    """Receives scalars as a run goes along.

    `step` is the number of updates of the stage made so far.
    """

    def write(self, step: int, scalars: Mapping[str, float], stage: str) -> None:
        """Records the scalars of one step of one stage."""
        ...

    def truncate_after(self, step: int, stage: str) -> None:
        """Forgets what was recorded after `step` of `stage`.

        Call it when a run resumes from a checkpoint of that step: the steps since are made again.
        """
        ...

    def close(self) -> None:
        """Flushes and closes; no write may follow."""
        ...


class JsonlWriter:
    """Appends one JSON object a line: `{"stage": ..., "step": ..., name: value, ...}`.

    A value that is not finite is written as null, because JSON has no NaN. Each row is flushed, so
    a killed run loses at most the row it was writing; that half row is dropped on reopening.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = pathlib.Path(path)
        self._file = _open_for_append(self._path)

    def write(self, step: int, scalars: Mapping[str, float], stage: str) -> None:
        values = {name: float(value) for name, value in scalars.items()}
        row = {"stage": stage, "step": int(step)} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        self._file.write(json.dumps(row, allow_nan=False) + "\n")

    def truncate_after(self, step: int, stage: str) -> None:
        def position(line: str) -> tuple[str, int]:
            row = json.loads(line)
            return row["stage"], row["step"]

        _cut_at_first_stale_line(self._path, position, step=step, stage=stage)

    def close(self) -> None:
        self._file.close()


class CsvWriter:
    """Appends one scalar a line under the header `stage,step,name,value`.

    The long form lets stages record different scalars in one file.
    """

    _HEADER = ("stage", "step", "name", "value")

    def __init__(self, path: str | os.PathLike[str]):
        self._path = pathlib.Path(path)
        self._file = _open_for_append(self._path)
        self._csv = csv.writer(self._file, lineterminator="\n")
        if self._path.stat().st_size == 0:
            self._csv.writerow(self._HEADER)

    def write(self, step: int, scalars: Mapping[str, float], stage: str) -> None:
        for name, value in scalars.items():
            self._csv.writerow((stage, int(step), name, float(value)))

    def truncate_after(self, step: int, stage: str) -> None:
        def position(line: str) -> tuple[str, int]:
            row = next(csv.reader([line]))
            # The header belongs to no stage, so it is never stale.
            return ("", 0) if row == list(self._HEADER) else (row[0], int(row[1]))

        _cut_at_first_stale_line(self._path, position, step=step, stage=stage)

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Writes TensorBoard scalars, each stage as a run of its own below `directory`.

    Separate runs let every stage count its steps from 0, and be resumed without hiding another's.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self._directory = pathlib.Path(directory)
        self._stages: dict[str, Any] = {}
        self._purge_step: dict[str, int] = {}

    def write(self, step: int, scalars: Mapping[str, float], stage: str) -> None:
        if stage not in self._stages:
            # Imported here so that a run without TensorBoard does not pay for it.
            import tensorboardX

            self._stages[stage] = tensorboardX.SummaryWriter(
                logdir=str(self._directory / stage), purge_step=self._purge_step.get(stage)
            )
        for name, value in scalars.items():
            self._stages[stage].add_scalar(name, float(value), int(step))

    def truncate_after(self, step: int, stage: str) -> None:
        # Event files are only appended to: a new file tells TensorBoard to hide the stale steps.
        self._purge_step[stage] = step + 1
        if stage in self._stages:
            self._stages.pop(stage).close()

    def close(self) -> None:
        for writer in self._stages.values():
            writer.close()
        self._stages.clear()


class MultiWriter:
    """Passes everything on to each of `writers`, in order."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = tuple(writers)

    def write(self, step: int, scalars: Mapping[str, float], stage: str) -> None:
        for writer in self._writers:
            writer.write(step, scalars, stage)

    def truncate_after(self, step: int, stage: str) -> None:
        for writer in self._writers:
            writer.truncate_after(step, stage)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def _open_for_append(path: pathlib.Path):
    """Opens a line-buffered file after dropping the half line a killed run may have left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return path.open("a", buffering=1, encoding="utf-8", newline="")


def _cut_at_first_stale_line(
    path: pathlib.Path, position: Callable[[str], tuple[str, int]], *, step: int, stage: str
) -> None:
    """Truncates the file where the run first went past `step` of `stage`.

    Lines stand in the order they were written, so whatever follows, of any stage, was made by the
    steps that are about to be made again.
    """
    kept_bytes = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            line_stage, line_step = position(line.decode())
            is_stale = line_stage == stage and line_step > step
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"line {number} of {path} is not a row of metrics; move the file away to go on"
            ) from error
        if is_stale:
            os.truncate(path, kept_bytes)
            return
        kept_bytes += len(line)
