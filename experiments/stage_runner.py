"""Runs one stage to its end: resume, train, log, validate, save."""

import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from instanas_jax import checkpoint, data, metrics, parallel, train_loop, train_state
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
    keep_steps: tuple[int, ...] = (),
    batches_named: str | None = None,
) -> tuple[TrainState, float]:
    """Trains until `total_steps` updates are done, from the newest checkpoint if there is one.

    Args:
      state: the networks that the stage before handed over, on the host.
      checkpoints: the stage's folder; kept steps go to a folder of the same name + "_kept".
      validate: scalars of a host state after so many updates; never of the test split.
      eval_steps: updates between validations, each followed by a checkpoint.
      keep_steps: updates after which a checkpoint is kept for good, ascending.
      batches_named: the order of batches is a function of the seed and this name; the stage's
        own by default.

    Returns:
      The final state on the host, and the seconds this stage has trained, resumes included.
    """
    rolling = checkpoint.StageCheckpoints(checkpoints)
    kept = (
        checkpoint.StageCheckpoints(kept_directory(checkpoints), keep=None) if keep_steps else None
    )
    fresh = _saved(train_state.ravel(train_state.restart(jax.device_get(state))), 0.0)
    done, saved = rolling.restore_latest(fresh) or (0, fresh)
    writer.truncate_after(done if done else -1, stage.name)
    # Resuming must start from the same bits as going on: the host copy of the state.
    host_state, seconds = saved["state"], float(saved["seconds"])

    order_seed = zlib.crc32(f"{batches_named or stage.name}/{seed}".encode())
    batches = data.train_batches(
        images,
        batch_size=batch_size,
        seed=order_seed,
        start_step=done,
        num_steps=total_steps - done,
    )
    logged: dict[int, int] = {}  # For each phase, the last stretch of `log_steps` with a row.
    started = time.perf_counter()
    bar = tqdm(total=total_steps, initial=done, desc=stage.name, unit="step", dynamic_ncols=True)
    with bar:
        running = train_loop.run(stage, parallel.replicate(host_state), batches, first_step=done)
        for done, device_state, device_metrics in running:
            bar.update()
            # Phases that take turns batch by batch would always meet the same multiples.
            phase = stage.phase_at(done - 1)
            if (done - 1) // log_steps != logged.get(phase) or done == total_steps:
                logged[phase] = (done - 1) // log_steps
                scalars = _fetch(device_metrics)
                writer.write(done, scalars, stage.name)
                bar.set_postfix_str(_postfix(scalars), refresh=False)
            is_kept = done in keep_steps
            if done % eval_steps == 0 or done == total_steps or is_kept:
                host_state = parallel.unreplicate(device_state)
                validation = validate(train_state.unravel(host_state), done)
                writer.write(done, validation, stage.name)
                tqdm.write(f"{stage.name} {done}/{total_steps}: {_postfix(validation)}")
                elapsed = seconds + time.perf_counter() - started
                saved = _saved(host_state, elapsed)
                if is_kept and kept is not None:
                    kept.save(done, saved)
                rolling.save(done, saved)
    for manager in (rolling, kept):
        if manager is not None:
            manager.close()
    return train_state.unravel(saved["state"]), float(saved["seconds"])


def _saved(state: TrainState, seconds: float) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {"state": state, "seconds": np.asarray(seconds)}


def is_done(checkpoints: Path, total_steps: int) -> bool:
    """Whether a stage has its last checkpoint."""
    if not checkpoints.is_dir():
        return False
    manager = checkpoint.StageCheckpoints(checkpoints)
    try:
        return total_steps in manager.steps()
    finally:
        manager.close()


def kept_directory(checkpoints: Path) -> Path:
    """Where a stage keeps the states that outlive it."""
    return checkpoints.with_name(checkpoints.name + "_kept")


def restore_kept(checkpoints: Path, step: int, like: TrainState) -> TrainState:
    """The state that the stage kept after `step` updates, on the host."""
    manager = checkpoint.StageCheckpoints(kept_directory(checkpoints), keep=None)
    try:
        saved = manager.restore(step, _saved(train_state.ravel(like), 0.0))
        return train_state.unravel(saved["state"])
    finally:
        manager.close()


def _fetch(device_metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in parallel.unreplicate(device_metrics).items()}


def _postfix(scalars: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in scalars.items())
