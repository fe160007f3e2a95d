"""Devices and processes: the only module that knows how many there are.

Every program runs through `jax.pmap`; one device of one process is the case n = 1 of the same
code. State is replicated, the global batch is split along its first axis: process p of P feeds
rows p * B / P to (p + 1) * B / P, each of its devices an even part of them. All arrays of a program
have a leading axis over the devices of all processes.
"""

import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instanas_jax import errors
from instanas_jax.errors import InputError

AXIS_NAME = "devices"

Value = TypeVar("Value")


def initialise(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_seconds: int = 300,
) -> None:
    """Joins the processes of one run; call it before anything else asks JAX for a device.

    Every process runs the same program with the same settings. All three arguments are None where
    the cluster's environment (Slurm, Open MPI, Kubernetes, TPU pods) says them.

    Args:
      coordinator: HOST:PORT on which process 0 is reached.
      num_processes: P.
      process_id: 0 to P - 1.
      timeout_seconds: how long to wait for the others.

    Raises:
      InputError: the arguments do not say, or no cluster is found, or the others do not come, or
        have more or fewer devices.
    """
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=timeout_seconds
        )
        counts = {len(jax.local_devices(process)) for process in range(jax.process_count())}
        if len(counts) == 1:  # Connects the devices: later the processes may be minutes apart.
            from_first(lambda: None)
    except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError.
        if num_processes is None and isinstance(error, ValueError):
            raise InputError(
                "no cluster is found (Slurm, Open MPI, Kubernetes, TPU pods): give every process "
                "--num_processes, --coordinator and a --process_id of its own"
            ) from error
        process = f"process {process_id} of {num_processes}" if num_processes else "a process"
        raise InputError(
            f"{process} cannot join {coordinator or 'its cluster'} ({errors.reason(error)}): give "
            "every process the same --coordinator and --num_processes and a --process_id of its "
            "own, or none of them under Slurm, Open MPI or Kubernetes"
        ) from error
    if len(counts) > 1:
        raise InputError(
            f"processes have {' or '.join(map(str, sorted(counts)))} devices: give each as many"
        )


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def from_first(make: Callable[[], Value]) -> Value:
    """What process 0 makes of it, in every process: for files, clocks and whatever may differ.

    Where it fails there, all processes end: by the same InputError, or else the first by its own
    exception and the others by an InputError that names it.

    Args:
      make: called in process 0 alone; its value travels by pickle, so arrays are on the host.
    """
    if jax.process_count() == 1:
        return make()
    made, failure = b"", None
    if is_first():
        try:
            made = pickle.dumps((make(), None))
        except Exception as error:  # Of whatever kind: the other processes wait for an answer.
            failure = error
            made = pickle.dumps((None, _for_the_others(error)))
    value, error = pickle.loads(_broadcast(made))
    if failure is not None:
        raise failure
    if error is not None:
        raise error
    return value


def _for_the_others(error: Exception) -> InputError:
    """What ends them where the first process ended by this."""
    if isinstance(error, InputError):
        return error
    text = " ".join(repr(error).split())[:200]
    return InputError(f"process 0 failed ({text}): see what it printed")


def _broadcast(data: bytes) -> bytes:
    """Process 0's bytes."""
    size = _sum_of_first(np.array(len(data), np.int32))
    values = np.zeros(size, np.uint8)
    if is_first():
        values[:] = np.frombuffer(data, np.uint8)
    return _sum_of_first(values).tobytes()


def _sum_of_first(values: np.ndarray) -> np.ndarray:
    """Process 0's values, by a sum in which all others are zero."""
    local = np.zeros((jax.local_device_count(), *values.shape), values.dtype)
    if is_first():
        local[0] = values
    return unreplicate(_sum_over_devices()(_global(local)))


@functools.cache
def _sum_over_devices() -> "Program":
    return Program(lambda values: lax.psum(values, AXIS_NAME))


def device_count() -> int:
    """Devices that share a batch, of all processes."""
    return jax.device_count()


def memory_bytes() -> int | None:
    """Memory of one accelerator; None where devices are the host's processors."""
    device = jax.local_devices()[0]
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def axis_name() -> str | None:
    """The axis over which programs average, or None for one device, where XLA would keep averages
    of one: 160 in the supernet's update, an eighth of its compile time."""
    return AXIS_NAME if device_count() > 1 else None


def process_count() -> int:
    """Processes that share a run."""
    return jax.process_count()


def share(batch_size: int) -> slice:
    """The rows of a global batch that this process feeds."""
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


@functools.cache
def _sharding() -> NamedSharding:
    # The order in which `jax.pmap` numbers the devices.
    processes = range(jax.process_count())
    devices = [device for process in processes for device in jax.local_devices(process)]
    return NamedSharding(Mesh(np.array(devices), (AXIS_NAME,)), PartitionSpec(AXIS_NAME))


def _global(local: np.ndarray) -> jax.Array:
    """This process's part [local devices, ...] of an array [devices, ...]."""
    shape = (device_count(), *local.shape[1:])
    return jax.make_array_from_process_local_data(_sharding(), local, shape)


def replicate(tree: Any) -> Any:
    """Copies a pytree to every device, along a new leading axis; programs may take it over."""

    def copy(leaf: Any) -> jax.Array:
        # What `jax.device_put` makes of it may be the host's memory, which no program takes over.
        leaf = jnp.array(np.asarray(leaf)[None])
        copies = [jax.device_put(leaf, device) for device in jax.local_devices()]
        shape = (device_count(), *leaf.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, _sharding(), copies)

    return jax.tree.map(copy, tree)


def replicated_shapes(tree: Any) -> Any:
    """Shapes and types of what `replicate` would make."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = np.asarray(leaf)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)  # As it arrives on a device.
        return jax.ShapeDtypeStruct((device_count(), *leaf.shape), dtype)

    return jax.tree.map(shape, tree)


def unreplicate(tree: Any) -> Any:
    """One device's copy of a replicated pytree, on the host; on CPUs a view of the device's memory,
    which no program takes over while the view lives."""
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_shards[0].data)[0, ...], tree)


def shard(batch: Any) -> Any:
    """Arrays [devices, B / devices, ...] of which this process holds its rows [B / P, ...]."""
    devices = jax.local_device_count()

    def split(array: np.ndarray) -> jax.Array:
        return _global(array.reshape(devices, array.shape[0] // devices, *array.shape[1:]))

    return jax.tree.map(split, batch)


def gather(tree: Any) -> Any:
    """Joins sharded results [devices, B / devices, ...] to host arrays [B, ...], everywhere."""
    if jax.process_count() > 1:
        tree = unreplicate(_gather_over_devices()(tree))
    return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), tree)


@functools.cache
def _gather_over_devices() -> "Program":
    return Program(lambda tree: lax.all_gather(tree, AXIS_NAME))


class Program:
    """A function over all devices; for arguments of some shapes it compiles when they first come,
    or ahead of that.

    Args:
      function: of one device's share; see `AXIS_NAME`.
      donate_argnums: arguments whose buffers it takes over.
    """

    def __init__(self, function: Callable[..., Any], *, donate_argnums: tuple[int, ...] = ()):
        self._function = jax.pmap(function, axis_name=AXIS_NAME, donate_argnums=donate_argnums)
        self._lock = threading.Lock()  # Who needs what another thread compiles waits for it.
        self._compiled: dict[Any, tuple[jax.stages.Compiled, Any]] = {}

    def compile(self, *arguments: Any) -> Any:
        """Compiles for arrays, or shapes, like these; returns the shapes of the result.

        Nothing runs, so another thread may use the devices meanwhile.
        """
        return self._for_shapes(arguments)[1]

    def planned_bytes(self, *arguments: Any) -> int:
        """Memory of one device while it runs: arguments, results in buffers of their own, and
        temporaries, as XLA laid them out."""
        plan: Any = self._for_shapes(arguments)[0].memory_analysis()
        results = plan.output_size_in_bytes - plan.alias_size_in_bytes
        return plan.argument_size_in_bytes + results + plan.temp_size_in_bytes

    def __call__(self, *arguments: Any) -> Any:
        return self._for_shapes(arguments)[0](*arguments)

    def _for_shapes(self, arguments: tuple[Any, ...]) -> tuple[jax.stages.Compiled, Any]:
        leaves, structure = jax.tree.flatten(arguments)
        key = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._compiled:  # What is there already waits for no compilation.
            with self._lock:
                if key not in self._compiled:
                    lowered = self._function.lower(*jax.tree.map(_local_stand_in, arguments))
                    self._compiled[key] = lowered.compile(), lowered.out_info
        return self._compiled[key]


def _local_stand_in(leaf: Any) -> np.ndarray:
    """`jax.pmap` is lowered for one process's part; what it compiles takes whole arrays."""
    shape = (jax.local_device_count(), *leaf.shape[1:])
    return np.broadcast_to(np.zeros((), leaf.dtype), shape)


@functools.lru_cache(maxsize=32)
def compile_step(step: Callable[[Any, Any], tuple[Any, Any]]) -> Program:
    """A program (replicated state, sharded inputs) -> (state, metrics) that takes over the
    state's buffers.

    The same function gives the same program, so that stages which share it compile once.
    """
    return Program(step, donate_argnums=(0,))


@functools.lru_cache(maxsize=32)
def compile_map(function: Callable[[Any, Any], Any]) -> Program:
    """A program (replicated inputs, sharded batch) -> one result an image, still sharded."""
    return Program(function)
