"""What a stage's own programs took, as rows of results."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import peers, reporting, roofline, stage_programs, step_peers
from benchmarks.stage_programs import Runner, Subject
from experiments.config import ModelConfig
from instanas_jax import convolution, parallel, train_loop, train_state
from instanas_jax.stage import Setting

PEERS = (*step_peers.TORCH, "native", "remat")

Row = dict[str, Any]
Calls = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      batch_size: images of an update, over all devices.
      repeats: timed turns.
      native_repeats: of them, those in which `native` takes part.
      peers: of `PEERS`.
      ceiling_size: side of the matrix product that is the ceiling of arithmetic.
    """

    model: ModelConfig
    num_classes: int
    batch_size: int
    repeats: int
    native_repeats: int
    peers: tuple[str, ...]
    ceiling_size: int


class Bench:
    """What the measurements of all stages share: one network, its images, the ceilings."""

    def __init__(self, options: Options):
        self.options = options
        self.spec = options.model.spec(num_classes=options.num_classes)
        self.dtype = options.model.dtype
        self.dataset = stage_programs.synthetic_dataset(self.spec, batch_size=options.batch_size)
        self.state = train_state.create(jax.random.key(0), self.spec)
        self.ceilings, self.ceiling_rows = roofline.measure_ceilings(
            self.dtype, size=options.ceiling_size, repeats=max(3, options.repeats)
        )
        self._compared: set[bytes] = set()  # Paths of the updates that peers have run.

    def measure(self, kind: str) -> list[Row]:
        """All rows of one kind of update (`stage_programs.KINDS`)."""
        subject = self._subject(kind)
        runner = self._runner(subject)
        rows = _compile_rows(kind, runner)
        runner.prepare()
        with contextlib.ExitStack() as processes:
            calls, peer_rows = self._peers(subject, runner, processes)
            runner.update()  # Later ones find their memory in place.
            seconds = self._time(runner, calls)
        rows += _time_rows(kind, seconds, self.options.batch_size)
        rows.append(self._roofline_row(subject, np.array(seconds["update"])))
        rows += _memory_rows(kind, runner)
        rows += peer_rows
        rows += step_peers.rows(f"{kind}_update", seconds, list(calls))
        if len(subject.stage.phases) == 1:
            rows += self._loop_rows(subject, runner)
        return rows

    def _time(self, runner: Runner, others: Calls) -> dict[str, list[float]]:
        own: Calls = {
            "host_batch": runner.host_batch,
            "prepare": runner.prepare,
            "update": runner.update,
        }
        repeats = dict.fromkeys([*own, *others], self.options.repeats)
        if "native" in others:
            repeats["native"] = min(self.options.native_repeats, self.options.repeats)
        return stage_programs.time_in_turn(own | others, repeats=repeats)

    def _subject(self, kind: str, **changes: Any) -> Subject:
        setting: Setting = stage_programs.make_setting(
            self.spec,
            self.dataset,
            lowering=convolution.default_lowering(),
            dtype=self.dtype,
        )
        return stage_programs.make_subject(kind, dataclasses.replace(setting, **changes))

    def _runner(self, subject: Subject) -> Runner:
        return Runner(subject, self.state, self.dataset, batch_size=self.options.batch_size)

    def _peers(
        self, subject: Subject, runner: Runner, processes: contextlib.ExitStack
    ) -> tuple[Calls, list[Row]]:
        """Updates of the peers by name, and rows of how they were made ready.

        Stages that share an update are compared once. All begin at the same weights and must
        agree in their first loss.

        Args:
          processes: takes up those in which peers run.
        """
        calls: Calls = {}
        rows: list[Row] = []
        if subject.paths is None or subject.paths.tobytes() in self._compared:
            return calls, rows
        self._compared.add(subject.paths.tobytes())
        losses = {"ours": step_peers.first_loss(runner)}
        for name in step_peers.TORCH:
            if name not in self.options.peers:
                continue
            try:
                fastest = step_peers.torch_update(
                    self.spec,
                    self.state,
                    subject,
                    runner,
                    dtype=self.dtype,
                    processes=processes if name == "torch_alone" else None,
                )
            except peers.Missing as missing:
                print(f"missing peer: {missing}")
                continue
            calls[name], losses[name] = fastest.step, fastest.first_loss
            rows += step_peers.trial_rows(f"{subject.kind}_update_{name}", fastest.trials)
        for name, changes in self._own_peers().items():
            peer = self._runner(self._subject(subject.kind, **changes))
            peer.inputs = runner.inputs
            rows += _compile_rows(f"{subject.kind}_{name}", peer)
            rows.append(_planned_row(f"{subject.kind}_{name}", peer))
            calls[name], losses[name] = peer.update, step_peers.first_loss(peer)
        if self.spec.head_dropout == 0.0:  # Which everyone draws in another way.
            step_peers.check_losses(subject.kind, losses, dtype=self.dtype)
        return calls, rows

    def _own_peers(self) -> dict[str, dict[str, Any]]:
        """What peers that are ours in another setting change of it, by name."""
        changes: dict[str, dict[str, Any]] = {}
        if "native" in self.options.peers:
            if convolution.default_lowering() == "native":
                print("native: what runs on this device anyway, not measured apart")
            else:
                changes["native"] = {"lowering": "native"}
        if "remat" in self.options.peers:
            changes["remat"] = {"remat": True}
        return changes

    def _roofline_row(self, subject: Subject, update: np.ndarray) -> Row:
        images, itemsize = self.options.batch_size, jax.numpy.dtype(self.dtype).itemsize
        if subject.paths is None:
            work = roofline.masked_work(self.spec, images, masks=subject.masks, itemsize=itemsize)
        else:
            work = roofline.update_work(self.spec, images, itemsize=itemsize, paths=subject.paths)
        seconds, bound = work.bound(self.ceilings)
        name = f"{subject.kind}_update_roofline_share"
        row = reporting.measurement(name, (seconds / update).tolist(), "fraction")
        return {**row, "bound": bound, "counted_flops": work.flops, "counted_bytes": work.bytes}

    def _loop_rows(self, subject: Subject, runner: Runner) -> list[Row]:
        """The training loop as runs drive it: it waits for the device at the end alone. Updates one
        by one between two stretches of it, since machines drift."""
        repeats = self.options.repeats
        running = train_loop.run(
            subject.stage,
            parallel.replicate(train_state.ravel(self.state)),
            stage_programs.batches(self.dataset, batch_size=self.options.batch_size),
        )

        def stretch() -> float:
            start = time.perf_counter()
            for _ in range(repeats - 1):
                next(running)
            jax.block_until_ready(next(running))
            return (time.perf_counter() - start) / repeats

        jax.block_until_ready(next(running))
        before = stretch()
        updates = stage_programs.time_in_turn(
            {"update": runner.update}, repeats={"update": repeats}
        )
        steps = [before, stretch()]
        wait = max(0.0, 1.0 - float(np.median(updates["update"])) / float(np.mean(steps)))
        return [
            reporting.measurement(f"{subject.kind}_loop_step", steps, "seconds"),
            reporting.measurement(f"{subject.kind}_input_wait_share", [wait], "fraction"),
        ]


def _compile_rows(name: str, runner: Runner) -> list[Row]:
    return [
        reporting.measurement(f"{name}_{program}_compile_{part}", [seconds], "seconds")
        for program, compiled in runner.compile().items()
        for part, seconds in dataclasses.asdict(compiled).items()
    ]


def _time_rows(kind: str, seconds: dict[str, list[float]], batch_size: int) -> list[Row]:
    parts = {name: np.array(seconds[name]) for name in ("host_batch", "prepare", "update")}
    step = parts["host_batch"] + parts["prepare"] + parts["update"]
    rows = [
        reporting.measurement(f"{kind}_{name}", list(times), "seconds")
        for name, times in {**parts, "step": step}.items()
    ]
    share = 1.0 - parts["update"] / step
    rows.append(
        reporting.measurement(f"{kind}_images_a_second", list(batch_size / step), "images/s")
    )
    rows.append(reporting.measurement(f"{kind}_input_share", list(share), "fraction"))
    return rows


def _planned_row(name: str, runner: Runner) -> Row:
    megabytes = runner.planned_bytes() / 1e6
    planned = reporting.measurement(f"{name}_update_planned_memory", [megabytes], "MB")
    return {**planned, "source": "memory_analysis of the compiled update, one device"}


def _memory_rows(kind: str, runner: Runner) -> list[Row]:
    rows = [_planned_row(kind, runner)]
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        peak = reporting.measurement(
            f"{kind}_peak_memory", [statistics["peak_bytes_in_use"] / 1e6], "MB"
        )
        rows.append({**peak, "source": "memory_stats of the first device, the process so far"})
    return rows
