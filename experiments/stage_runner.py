"""Runs one stage to its end: resume, train, log, validate, save."""

import functools
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from instanas_jax import checkpoint, data, feeding, metrics, parallel, train_loop, train_state
from instanas_jax.errors import InputError
from instanas_jax.stage import Stage
from instanas_jax.train_state import TrainState

Validate = Callable[[TrainState, int], dict[str, float]]


def run_stage(
    stage: Stage,
    state: TrainState,
    images: data.Images,
    *,
    total_steps: int,
    batch_size: int,
    seed: int,
    checkpoints: Path,
    writer: metrics.Writer,
    validate: Validate,
    eval_steps: int,
    log_steps: int,
    first_step: int = 0,
    keep_steps: tuple[int, ...] = (),
    batches_named: str | None = None,
) -> tuple[TrainState, float]:
    """Trains until `total_steps` updates are done, from the newest checkpoint if there is one.

    Args:
      state: what the stage before handed over, on the host; its networks alone unless
        `first_step` is given.
      checkpoints: the stage's folder; kept steps go to a folder of the same name + "_kept".
      validate: scalars of a host state after so many updates; never of the test split.
      eval_steps: updates between validations, each followed by a checkpoint.
      first_step: updates of this stage that `state`, optimizers included, has behind it already.
      keep_steps: updates after which a checkpoint is kept for good, ascending.
      batches_named: the order of batches is a function of the seed and this name; the stage's
        own by default.

    Returns:
      The final state on the host, and the seconds this stage has trained, resumes included.

    Raises:
      InputError: the training has diverged; what it has made since it was finite is not saved.
    """
    state = jax.device_get(state)
    begin = state if first_step else train_state.restart(state)
    fresh = _saved(train_state.ravel(begin), 0.0)
    files = _StageFiles(checkpoints, keep_steps)
    done, saved = parallel.from_first(lambda: files.restore_latest(fresh) or (first_step, fresh))
    parallel.from_first(lambda: writer.truncate_after(done if done else -1, stage.name))
    # Resuming must start from the same bits as going on: the host copy of the state.
    host_state, seconds = saved["state"], float(saved["seconds"])

    order_seed = zlib.crc32(f"{batches_named or stage.name}/{seed}".encode())
    batches = feeding.train_batches(
        images,
        batch_size=batch_size,
        seed=order_seed,
        start_step=done,
        num_steps=total_steps - done,
    )
    # For each phase, the last stretch of `log_steps` with a row; also of rows from before a resume.
    logged = {stage.phase_at(step): step // log_steps for step in range(first_step, done)}
    started = time.perf_counter()
    bar = tqdm(
        total=total_steps,
        initial=done,
        desc=stage.name,
        unit="step",
        dynamic_ncols=True,
        disable=not parallel.is_first(),
    )
    rows = LateRows(writer, stage.name, bar)
    with bar:
        running = train_loop.run(stage, parallel.replicate(host_state), batches, first_step=done)
        for done, device_state, device_metrics in running:
            bar.update()
            # Phases that take turns batch by batch would always meet the same multiples.
            phase = stage.phase_at(done - 1)
            if (done - 1) // log_steps != logged.get(phase) or done == total_steps:
                logged[phase] = (done - 1) // log_steps
                rows.add(done, device_metrics)
            if done % eval_steps == 0 or done == total_steps or done in keep_steps:
                parallel.from_first(rows.finish)
                host_state = parallel.unreplicate(device_state)
                _check_finite(host_state, stage.name, done)
                validation = validate(train_state.unravel(host_state), done)
                write_validation = functools.partial(writer.write, done, validation, stage.name)
                parallel.from_first(write_validation)
                if parallel.is_first():
                    tqdm.write(f"{stage.name} {done}/{total_steps}: {_postfix(validation)}")
                elapsed = seconds + time.perf_counter() - started
                saved = _saved(host_state, elapsed)
                parallel.from_first(functools.partial(files.save, done, saved))
    files.close()
    return train_state.unravel(saved["state"]), float(saved["seconds"])


def _check_finite(state: TrainState, stage_name: str, done: int) -> None:
    """InputError if parameters are no numbers any more, of a raveled state on the host."""
    parameters = {"supernet": state.supernet["params"], "controller": state.controller["params"]}
    for network, packed in parameters.items():
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(packed)):
            raise InputError(
                f"{stage_name} has diverged: after {done} updates parameters of the {network} are "
                "no numbers: lower the learning rate, and begin in another --workdir"
            )


class LateRows:
    """Metrics of a step are fetched when the next are added, when the device is long done: reading
    them at once would wait for it, and leave it idle afterwards.

    A row that process 0 of several can't write ends all of them in `finish`, where they meet:
    between steps it would leave alone, and the others wait for it until they give up.
    """

    def __init__(self, writer: metrics.Writer, stage_name: str, bar: tqdm):
        self._writer, self._stage_name, self._bar = writer, stage_name, bar
        self._waiting: tuple[int, dict[str, Any]] | None = None
        self._failure: Exception | None = None

    def add(self, done: int, device_metrics: dict[str, Any]) -> None:
        try:
            self._write_waiting()
        except Exception as error:  # Of whatever kind: see the class.
            if parallel.process_count() == 1:
                raise
            self._failure = self._failure or error
        self._waiting = done, device_metrics

    def finish(self) -> None:
        """Writes what waits; fails with the first row that failed since."""
        if self._failure:
            raise self._failure
        self._write_waiting()

    def _write_waiting(self) -> None:
        if self._waiting is None:
            return
        (done, device_metrics), self._waiting = self._waiting, None
        scalars = {
            name: float(value) for name, value in parallel.unreplicate(device_metrics).items()
        }
        self._bar.set_postfix_str(_postfix(scalars), refresh=False)
        self._writer.write(done, scalars, self._stage_name)


class _StageFiles:
    """A stage's checkpoints, rolling and kept; process 0 alone opens them.

    Args:
      checkpoints: as in `run_stage`, like `keep_steps`.
    """

    def __init__(self, checkpoints: Path, keep_steps: tuple[int, ...]):
        self._keep_steps = keep_steps
        self._rolling = self._kept = None
        if parallel.is_first():
            self._rolling = checkpoint.StageCheckpoints(checkpoints)
            if keep_steps:
                self._kept = checkpoint.StageCheckpoints(kept_directory(checkpoints), keep=None)

    def restore_latest(self, like: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Updates done and what the newest checkpoint holds, if there is one."""
        return self._rolling.restore_latest(like) if self._rolling else None

    def save(self, done: int, saved: dict[str, Any]) -> None:
        if self._kept and done in self._keep_steps:
            self._kept.save(done, saved)
        if self._rolling:
            self._rolling.save(done, saved)

    def close(self) -> None:
        for manager in (self._rolling, self._kept):
            if manager:
                manager.close()


def _saved(state: TrainState, seconds: float) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {"state": state, "seconds": np.asarray(seconds)}


def is_done(checkpoints: Path, total_steps: int) -> bool:
    """Whether a stage has its last checkpoint; process 0 looks for all."""

    def look() -> bool:
        if not checkpoints.is_dir():
            return False
        manager = checkpoint.StageCheckpoints(checkpoints)
        try:
            return total_steps in manager.steps()
        finally:
            manager.close()

    return parallel.from_first(look)


def newest(checkpoints: Path, like: TrainState) -> TrainState | None:
    """The state of a stage's newest readable checkpoint, on the host; None if it has none."""
    if not checkpoints.is_dir():
        return None
    manager = checkpoint.StageCheckpoints(checkpoints)
    try:
        restored = manager.restore_latest(_saved(train_state.ravel(like), 0.0))
    finally:
        manager.close()
    return train_state.unravel(restored[1]["state"]) if restored else None


def kept_directory(checkpoints: Path) -> Path:
    """Where a stage keeps the states that outlive it."""
    return checkpoints.with_name(checkpoints.name + "_kept")


def restore_kept(checkpoints: Path, step: int, like: TrainState) -> TrainState:
    """The state that the stage kept after `step` updates, on the host.

    Raises:
      InputError: it is lost or damaged.
    """
    fresh = _saved(train_state.ravel(like), 0.0)

    def restore() -> dict[str, Any]:
        manager = checkpoint.StageCheckpoints(kept_directory(checkpoints), keep=None)
        try:
            return manager.restore(step, fresh)
        except InputError as error:
            raise InputError(
                f"{kept_directory(checkpoints)} does not give the state after {step} updates: "
                f"delete it and {checkpoints}, and repeat the command, which trains that again"
            ) from error
        finally:
            manager.close()

    return train_state.unravel(parallel.from_first(restore)["state"])


def _postfix(scalars: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in scalars.items())
