"""Writers of scalars to JSONL and TensorBoard, which a resume leaves as if it had never stopped."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from instanas_jax import files
from instanas_jax.errors import InputError


class Writer(Protocol):
    """Receives scalars as a run goes along.

    `step` is the number of updates of the stage made so far.
    """

    def write(self, step: int, scalars: Mapping[str, float], stage: str) -> None:
        """Records the scalars of one step of one stage."""
        ...

    def truncate_after(self, step: int, stage: str) -> None:
        """Forgets what was recorded after `step` of `stage`, and of no other stage.

        Call it when a stage begins, or resumes from a checkpoint of that step: the steps since are
        made again.
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
        lines = self._path.read_bytes().splitlines(keepends=True)
        kept = [
            line
            for number, line in enumerate(lines, start=1)
            if not self._is_stale(number, line, step, stage)
        ]
        if len(kept) < len(lines):
            self._file.close()
            files.write_bytes(self._path, b"".join(kept))
            self._file = _open_for_append(self._path)

    def _is_stale(self, number: int, line: bytes, step: int, stage: str) -> bool:
        try:
            row = json.loads(line)
            return row["stage"] == stage and row["step"] > step
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"line {number} of {self._path} is not a row of metrics; move the file away to go "
                "on"
            ) from error

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
        # Imported here so that a run without TensorBoard does not pay for it.
        from tensorboardX import summary

        if stage not in self._stages:
            self._stages[stage] = self._open(stage)
        for name, value in scalars.items():
            self._stages[stage].write_event(
                _event(step=step, summary=summary.scalar(name, float(value)))
            )
        self._stages[stage].flush()

    def _open(self, stage: str) -> Any:
        """Without the queue and thread of `SummaryWriter`: where these can't write, the thread ends
        and the next row waits for it without an end."""
        from tensorboardX.event_file_writer import EventsWriter

        folder, step = self._directory / stage, self._purge_step.get(stage)
        folder.mkdir(parents=True, exist_ok=True)
        # Files of one second would else have one name.
        writer = EventsWriter(str(folder / "events"), f".{len(list(folder.iterdir()))}")
        if step is not None:
            writer.write_event(_event(step=step, session_log={"status": "START"}))
        return writer

    def truncate_after(self, step: int, stage: str) -> None:
        # Event files are only appended to: a new file tells TensorBoard to hide the stale steps.
        self._purge_step[stage] = step + 1
        if stage in self._stages:
            self._stages.pop(stage).close()

    def close(self) -> None:
        for writer in self._stages.values():
            writer.close()
        self._stages.clear()


def _event(**fields: Any) -> Any:
    """One of TensorBoard's, of now."""
    from tensorboardX.proto import event_pb2

    made: Any = event_pb2  # Its classes are made when it is imported.
    return made.Event(wall_time=time.time(), **fields)


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
