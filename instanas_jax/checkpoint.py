"""Checkpoints of one stage, through orbax: save, restore, walk back over a damaged one."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from instanas_jax import errors
from instanas_jax.errors import InputError


class StageCheckpoints:
    """The checkpoints of one stage in a folder of their own, numbered by updates done.

    A checkpoint appears under its name only when it is complete, so a kill leaves the one before.
    One process has it to itself: of a run of many, process 0.

    Args:
      directory: made where absent.
      keep: how many of the newest to keep; None for all.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int | None = 2):
        self._directory = Path(directory).resolve()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._damaged: list[int] = []  # Whose places the next save clears.
        # Or orbax would wait for the other processes of a run.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            enable_async_checkpointing=False,
            multiprocessing_options=alone,
        )
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=options,
            item_handlers=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        )

    def save(self, step: int, state: Any) -> None:
        """Writes a host pytree as the checkpoint after `step` updates, if it is not there yet.

        Those that `restore_latest` passed over go aside first, as STEP.damaged: Orbax saves no step
        before its newest.

        Raises:
          InputError: it cannot be written.
        """
        if self._damaged:
            for damaged in self._damaged:
                place = self._directory / str(damaged)
                shutil.rmtree(place.with_suffix(".damaged"), ignore_errors=True)
                place.rename(place.with_suffix(".damaged"))
            self._damaged = []
            self._manager.reload()
        if step not in self._manager.all_steps():
            try:
                self._manager.save(step, args=ocp.args.StandardSave(state))
            except ValueError as error:  # So TensorStore reports whatever the system refuses.
                reason = errors.reason(error)
                raise InputError(
                    f"checkpoint {self._directory / str(step)} cannot be written ({reason}): make "
                    "room or check permissions, and repeat the command"
                ) from error

    def steps(self) -> list[int]:
        """Updates behind each checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """The newest readable checkpoint as (updates done, state on the host), or None.

        Walks back over those that a full disk or a crash has damaged, and says so.

        Args:
          like: a pytree of arrays or shapes with the structure of what was saved.
        """
        self._damaged = []
        for step in reversed(self.steps()):
            try:
                return step, self.restore(step, like)
            except InputError as error:
                logging.getLogger(__name__).warning("%s; an earlier one is taken, or none", error)
                self._damaged.append(step)
        return None

    def restore(self, step: int, like: Any) -> Any:
        """The checkpoint after `step` updates.

        Raises:
          InputError: it is absent or damaged.
          PermissionError: it may not be read.
        """
        abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except PermissionError:  # Which is no damage: nothing may take the checkpoint's place.
            raise
        except Exception as error:  # Orbax documents no common base of what it raises.
            reason = errors.reason(error)
            raise InputError(
                f"checkpoint {self._directory / str(step)} cannot be restored ({reason}): copy it "
                "again from where it was written"
            ) from error

    def close(self) -> None:
        self._manager.close()
