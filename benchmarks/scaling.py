"""The pretraining step of one global batch over 1, 2, 4 and 8 devices.

python -m benchmarks.scaling --output=benchmarks/results/scaling.json

Each number of devices has a process of its own, one after the other, which takes the first so many
of the local accelerators; numbers beyond what is there are left out. Where there are only CPUs, XLA
splits the host into so many devices, which share its cores: there is no speed to gain, and the
rows show what dividing a batch costs, and that it changes no more than rounding does.

Rows, after the number of devices:

  step                   seconds of preparing and updating, to the end
  images_a_second        through such steps
  speed_over_1_device    ratio of medians; on a CPU the best is 1, on accelerators their number
  efficiency             accelerators: that ratio over the number of devices
  largest_difference     after --compared_steps updates from the same start, the largest difference
                         of a parameter from that on one device, relative to the largest parameter
                         of its array, or to 0.001 where that is less
  relative_difference    likewise of all parameters as one vector, relative to how far the updates
                         took it on one device

Those two also as 1_device_rounding_...: on one device, from a start whose parameters are moved by
one unit in the last place, up or down. Fresh networks amplify rounding with every update, so a
difference says something only beside this one: dividing a batch changes the order of its sums, and
ought to change no more than that.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import reporting, stage_programs
from experiments import flags as flags_lib
from experiments.config import ModelConfig
from instanas_jax import convolution, environment, parallel, train_loop, train_state
from instanas_jax.errors import InputError

Result = TypeVar("Result")
Params = dict[str, np.ndarray]  # By the path in the supernet's tree.

# Largest value of an array that holds nothing but rounding: a bias that a batch norm further on
# takes out again has no other gradient.
_ROUNDING = 1e-3
_HOST_DEVICES = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Options:
    """What each process measures; see the flags."""

    model: ModelConfig
    num_classes: int
    batch_size: int
    repeats: int
    compared_steps: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one number of devices."""

    step_seconds: list[float]
    start: Params
    params: Params  # After the compared steps.
    nudged: Params | None  # On one device: likewise, from a start moved by rounding.


def _define_flags() -> None:
    flags_lib.define_section(ModelConfig())
    flags_lib.define_output()
    flags.DEFINE_integer("num_classes", 100, "Classes of the classifier.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 64, "Images an update, over all devices.", lower_bound=1)
    flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Numbers of devices; the first is 1.")
    flags.DEFINE_integer("repeats", 5, "Timed steps of each number of devices.", lower_bound=1)
    flags.DEFINE_integer(
        "compared_steps", 1, "Updates after which parameters are compared.", lower_bound=1
    )


def _read_options() -> Options:
    values = flags.FLAGS
    return Options(
        model=flags_lib.read_section(ModelConfig),
        num_classes=values.num_classes,
        batch_size=values.batch_size,
        repeats=values.repeats,
        compared_steps=values.compared_steps,
    )


def _read_counts(batch_size: int) -> list[int]:
    names = flags.FLAGS.devices
    if not names or names[0] != "1" or not all(re.fullmatch("[1-9][0-9]*", n) for n in names):
        raise InputError(f"--devices={','.join(names)}: name numbers of devices, 1 first: 1,2,4")
    counts = [int(name) for name in names]
    for count in counts:
        if batch_size % count:
            raise InputError(
                f"--batch_size={batch_size} cannot be shared evenly by {count} devices: choose a "
                "multiple of every number in --devices"
            )
    return counts


def _in_process_of(devices: int | None, function: Callable[..., Result], *arguments: Any) -> Result:
    """A function's result from a process that sees so many devices; None: all there are."""
    with concurrent.futures.ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_limit_devices,
        initargs=(devices,),
    ) as process:
        return process.submit(function, *arguments).result()


def _limit_devices(devices: int | None) -> None:
    """Before the backends start, each of which reads its own setting and none of the others."""
    environment.configure_cpu()
    if devices is None:
        return
    kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(_HOST_DEVICES)]
    os.environ["XLA_FLAGS"] = " ".join([*kept, f"{_HOST_DEVICES}={devices}"])
    first = ",".join(str(index) for index in range(devices))
    for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
        jax.config.update(name, first)


def _find_devices() -> tuple[str, int]:
    return jax.default_backend(), parallel.device_count()


def _measure(devices: int, options: Options) -> Measured:
    """Runs in a process that sees so many devices."""
    if parallel.device_count() != devices:
        raise InputError(
            f"{parallel.device_count()} devices where {devices} were to be measured: this backend "
            f"({jax.default_backend()}) cannot be limited, name its number alone in --devices"
        )
    spec = options.model.spec(num_classes=options.num_classes)
    dataset = stage_programs.synthetic_dataset(spec, batch_size=options.batch_size)
    setting = stage_programs.make_setting(
        spec, dataset, lowering=convolution.default_lowering(), dtype=options.model.dtype
    )
    subject = stage_programs.make_subject("pretrain", setting)
    state = train_state.create(jax.random.key(0), spec)

    def train(state: train_state.TrainState) -> tuple[Any, Params]:
        """Steps that go on, and the parameters after the compared ones."""
        batches = stage_programs.batches(dataset, batch_size=options.batch_size)
        start = parallel.replicate(train_state.ravel(state))
        running = train_loop.run(subject.stage, start, batches)
        for _ in range(options.compared_steps):
            _, latest, _ = next(running)
        return running, _params(train_state.unravel(parallel.unreplicate(latest)))  # pyright: ignore

    nudged = train(_nudge(state))[1] if devices == 1 else None
    running, params = train(state)
    return Measured(_step_seconds(running, options.repeats), _params(state), params, nudged)


def _nudge(state: train_state.TrainState) -> train_state.TrainState:
    """The supernet's parameters one unit in the last place away, up or down; zeros stay."""
    signs = np.random.default_rng(0)

    def nudge(leaf: Any) -> np.ndarray:
        towards = np.where(signs.integers(2, size=leaf.shape), np.inf, -np.inf)
        moved = np.nextafter(leaf, towards.astype(leaf.dtype))
        return np.where(leaf == 0.0, leaf, moved)

    params = jax.tree.map(nudge, state.supernet["params"])
    return dataclasses.replace(state, supernet={**state.supernet, "params": params})


def _params(state: train_state.TrainState) -> Params:
    """Copies: the next steps take over what a state on the host may still share."""
    leaves = jax.tree_util.tree_flatten_with_path(state.supernet["params"])[0]
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def _step_seconds(running: Any, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(next(running))
        seconds.append(time.perf_counter() - start)
    return seconds


def differences(params: Params, others: Params, *, start: Params) -> tuple[float, float]:
    """How far other parameters are from `params`, both trained from `start`.

    Returns:
      The largest difference of one, relative to the largest of its array or `_ROUNDING`; and the
      difference of all as one vector, relative to how far training took `params`.
    """
    largest, apart, moved = 0.0, 0.0, 0.0
    for path, array in params.items():
        difference = np.float64(others[path]) - array
        scale = max(float(np.abs(array).max()), _ROUNDING)
        largest = np.maximum(largest, np.abs(difference).max() / scale)  # Keeps a nan.
        apart += float(np.sum(difference**2))
        moved += float(np.sum((np.float64(array) - start[path]) ** 2))
    return float(largest), float(np.sqrt(apart / moved))


def _rows(devices: int, measured: Measured, one: Measured, options: Options, backend: str):
    name = f"{devices}_devices" if devices > 1 else "1_device"
    step = measured.step_seconds
    rows = [
        reporting.measurement(f"{name}_step", step, "seconds"),
        reporting.measurement(
            f"{name}_images_a_second", [options.batch_size / s for s in step], "images/s"
        ),
    ]
    if devices > 1:
        speed = statistics.median(one.step_seconds) / statistics.median(step)
        rows.append(reporting.measurement(f"{name}_speed_over_1_device", [speed], "ratio"))
        if backend != "cpu":
            rows.append(reporting.measurement(f"{name}_efficiency", [speed / devices], "ratio"))
    if measured.nudged is not None:
        rows += _difference_rows(f"{name}_rounding", measured.nudged, one)
    else:
        rows += _difference_rows(name, measured.params, one)
    return rows


def _difference_rows(name: str, params: Params, one: Measured) -> list[dict[str, Any]]:
    largest, relative = differences(one.params, params, start=one.start)
    return [
        reporting.measurement(f"{name}_largest_difference", [largest], "relative_error"),
        reporting.measurement(f"{name}_relative_difference", [relative], "relative_error"),
    ]


def _run() -> None:
    output, options = flags_lib.read_output(), _read_options()
    counts = _read_counts(options.batch_size)
    backend, available = _in_process_of(None, _find_devices)
    if backend != "cpu":
        for count in counts:
            if count > available:
                print(f"{count} devices: left out, this machine has {available}")
        counts = [count for count in counts if count <= available]
    rows: list[dict[str, Any]] = []
    one = None
    for count in tqdm(counts, desc="devices", unit="number"):
        measured = _in_process_of(count, _measure, count, options)
        one = one or measured
        rows += _rows(count, measured, one, options, backend)
    reporting.write_report(output, benchmark="scaling", results=rows)
    reporting.print_rows(rows)


def main() -> None:
    _define_flags()
    flags_lib.start(_run)


if __name__ == "__main__":
    main()
