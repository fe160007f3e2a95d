"""The only training loop: a generator. Logging, saving and stopping are the caller's."""

from collections.abc import Iterable, Iterator
from typing import Any

from instanas_jax import parallel
from instanas_jax.stage import Stage
from instanas_jax.train_state import TrainState


def run(
    stage: Stage, state: TrainState, batches: Iterable[Any], *, first_step: int = 0
) -> Iterator[tuple[int, TrainState, dict[str, Any]]]:
    """Feeds batches to a stage's phases.

    Nothing here waits for the device: metrics are handed on as they are, to be fetched late. The
    state that is yielded is consumed by the next step, so keep a copy of what must outlive it.

    Args:
      stage: what to run.
      state: replicated; its buffers are taken over.
      batches: on the devices, one an update; see `feeding`.
      first_step: number of updates that `state` has behind it.

    Yields:
      Updates done, the new state (replicated), and the phase's metrics (replicated).
    """
    programs = _programs(stage)
    for done, batch in enumerate(batches, start=first_step):
        prepare, update = programs[stage.phase_at(done)]
        state, metrics = update(state, prepare(state, batch))
        yield done + 1, state, metrics


def compile_ahead(stage: Stage, state: TrainState, batch: Any) -> None:
    """Compiles a stage's programs before their turn, while another stage trains.

    Args:
      state: raveled, on the host; its values are not looked at.
      batch: on the host, the rows of this process; likewise.
    """
    shapes = parallel.replicated_shapes(state)
    for prepare, update in _programs(stage):
        inputs = prepare.compile(shapes, parallel.shard(batch))
        update.compile(shapes, inputs)


def _programs(stage: Stage) -> list[tuple[parallel.Program, parallel.Program]]:
    """Of each phase: prepare, update."""
    return [
        (parallel.compile_map(phase.prepare), parallel.compile_step(phase.update))
        for phase in stage.phases
    ]
