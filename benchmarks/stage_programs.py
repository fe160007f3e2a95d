"""Each stage's updates, built as runs build them, on images that need no files."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from experiments import recipe
from experiments.config import Config, ModelConfig
from experiments.stage_config import FinetuneConfig, PretrainConfig, SearchConfig
from instanas_jax import (
    convolution,
    cost,
    data,
    data_sources,
    feeding,
    latency,
    parallel,
    policy,
    search_space,
    train_state,
)
from instanas_jax.search_space import SupernetSpec
from instanas_jax.stage import Phase, Setting, Stage

KINDS = ("pretrain", "search_controller", "search_supernet", "finetune", "static")

_STEPS = 1000  # Of every stage; only schedules depend on it.
_EPOCH_STEPS = 100
_FLOPS_A_MS = 1e8
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def synthetic_dataset(spec: SupernetSpec, *, batch_size: int) -> data.Dataset:
    """Images of the spec's size and classes, for some different batches."""
    source = data_sources.synthetic(
        train_size=max(2 * batch_size, spec.num_classes),
        test_size=1,
        image_size=spec.image_size,
        num_classes=spec.num_classes,
    )
    return data.split(source, validation_size=0)


def make_setting(
    spec: SupernetSpec, dataset: data.Dataset, *, lowering: convolution.Lowering, dtype: str
) -> Setting:
    """As a run's, with its default augmentation."""
    config = Config(dataset.name, model=ModelConfig(dtype=dtype))
    return recipe.make_setting(config, spec, dataset, lowering=lowering)


def counted_table(spec: SupernetSpec) -> latency.LatencyTable:
    """A latency table by FLOPs: rewards need one, and no time depends on what it holds."""
    flops, _ = cost.path_costs(spec)
    return latency.LatencyTable(
        backend="counted",
        device={},
        versions={},
        spec=spec.to_json(),
        batch_size=1,
        dtype="float32",
        fixed_ms=dict.fromkeys(latency.FIXED_PARTS, 0.0),
        cells_ms=flops / _FLOPS_A_MS,
        settled_ms=flops / _FLOPS_A_MS,
        spread_ms=np.zeros(spec.mask_shape),
        repeats=1,
        in_network_ms=dict.fromkeys(latency.IN_NETWORK, 0.0),
    )


@dataclasses.dataclass(frozen=True)
class Subject:
    """One kind of update of a stage.

    Attributes:
      kind: one of `KINDS`.
      paths: bool [L, O], those that a supernet's update computes; None for the controller's.
      masks: of each image that the controller's update, which trains no path, passes through the
        supernet.
    """

    kind: str
    stage: Stage
    phase: Phase
    paths: np.ndarray | None
    masks: int = 0


def make_subject(kind: str, setting: Setting) -> Subject:
    """Under the published recipe (`experiments.config`).

    `static` finetunes MobileNetV2's architecture, `finetune` a policy that settled nothing.
    """
    spec = setting.spec
    every_path = np.ones(spec.mask_shape, bool)
    if kind == "pretrain":
        stage = recipe.pretrain_stage(
            setting, PretrainConfig(), total_steps=_STEPS, paths=every_path
        )
        return Subject(kind, stage, stage.phases[0], every_path)
    if kind in ("search_controller", "search_supernet"):
        section = SearchConfig()
        stage = recipe.search_stage(
            setting,
            section,
            counted_table(spec),
            total_steps=_STEPS,
            epoch_steps=_EPOCH_STEPS,
        )
        if kind == "search_supernet":
            return Subject(kind, stage, stage.phases[1], every_path)
        return Subject(kind, stage, stage.phases[0], None, masks=section.samples + 1)
    settled = policy.Settled.nothing(spec.mask_shape)
    if kind == "static":
        settled = policy.Settled.architecture(
            search_space.uniform_architecture(spec, search_space.MOBILENETV2_OP)
        )
    stage = recipe.finetune_stage(setting, FinetuneConfig(), _STEPS, settled)
    return Subject(kind, stage, stage.phases[0], settled.may_run(spec.forced_cells))


@dataclasses.dataclass(frozen=True)
class CompileSeconds:
    """Of one program; both nearly 0 where another stage has compiled it."""

    trace: float  # Tracing, and lowering to StableHLO.
    xla: float


class Runner:
    """A subject's two programs over all devices, and a state that they train.

    Args:
      subject: what to run.
      state: of fresh networks, on the host; stays as it is.
      dataset: where batches come from.
      batch_size: images of a global batch.
    """

    def __init__(
        self,
        subject: Subject,
        state: train_state.TrainState,
        dataset: data.Dataset,
        *,
        batch_size: int,
    ):
        self._prepare = parallel.compile_map(subject.phase.prepare)
        self._update = parallel.compile_step(subject.phase.update)
        self._host_state = train_state.ravel(state)
        self._batches = batches(dataset, batch_size=batch_size)
        self._batch = next(self._batches)
        self.state = parallel.replicate(self._host_state)
        self.inputs: Any = None

    def compile(self) -> dict[str, CompileSeconds]:
        """Of `prepare`, unless inputs are there already, and `update`."""
        shapes = parallel.replicated_shapes(self._host_state)
        inputs, seconds = self.inputs, {}
        if inputs is None:
            inputs, seconds["prepare"] = _timed_compile(self._prepare, shapes, self._batch)
        _, seconds["update"] = _timed_compile(self._update, shapes, inputs)
        return seconds

    def planned_bytes(self) -> int:
        """Memory of one device while `update` runs, as XLA laid it out."""
        return self._update.planned_bytes(self.state, self.inputs)

    def host_batch(self) -> None:
        """The next batch, shared out to devices."""
        self._batch = next(self._batches)

    def prepare(self) -> Any:
        self.inputs = jax.block_until_ready(self._prepare(self.state, self._batch))
        return self.inputs

    def update(self) -> dict[str, Any]:
        """Of the inputs that `prepare` made; returns the metrics."""
        self.state, metrics = jax.block_until_ready(self._update(self.state, self.inputs))
        return metrics


def batches(dataset: data.Dataset, *, batch_size: int) -> Iterator[Any]:
    """Batches on the devices as a stage reads them, without an end."""
    for first in itertools.count(step=_EPOCH_STEPS):
        yield from feeding.train_batches(
            dataset.train,
            batch_size=batch_size,
            seed=0,
            start_step=first,
            num_steps=_EPOCH_STEPS,
        )


def _timed_compile(program: parallel.Program, *arguments: Any) -> tuple[Any, CompileSeconds]:
    with _xla_seconds() as seconds:
        start = time.perf_counter()
        result = program.compile(*arguments)
        total = time.perf_counter() - start
    return result, CompileSeconds(trace=total - sum(seconds), xla=sum(seconds))


@contextlib.contextmanager
def _xla_seconds() -> Iterator[list[float]]:
    """Seconds of every compilation by XLA inside the block."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def time_in_turn(
    calls: dict[str, Callable[[], Any]], *, repeats: dict[str, int]
) -> dict[str, list[float]]:
    """Seconds of each call, A B A B; one with fewer repeats sits the last turns out."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(repeats.values())):
        for name, call in calls.items():
            if turn < repeats[name]:
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    return seconds
