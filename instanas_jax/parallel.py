"""Devices: the only module that knows how many there are.

Every program runs through `jax.pmap`; one device is the case n = 1 of the same code. State is
replicated, the global batch is split along its first axis.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instanas_jax.errors import InputError

AXIS_NAME = "devices"


def device_count() -> int:
    """Devices that share a batch."""
    return jax.local_device_count()


def check_batch_size(batch_size: int, *, flag: str) -> None:
    """InputError unless the devices can share a batch of this size evenly."""
    devices = device_count()
    if batch_size < 1 or batch_size % devices:
        raise InputError(
            f"--{flag}={batch_size} cannot be shared evenly by {devices} devices: choose a "
            f"multiple of {devices}"
        )


def replicate(tree: Any) -> Any:
    """Copies a pytree to every device, along a new leading axis."""
    devices = jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS_NAME,)), PartitionSpec(AXIS_NAME))

    def copy(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.device_put(np.broadcast_to(leaf, (len(devices), *leaf.shape)), sharding)

    return jax.tree.map(copy, tree)


def replicated_shapes(tree: Any) -> Any:
    """Shapes and types of what `replicate` would make."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = np.asarray(leaf)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)  # As it arrives on a device.
        return jax.ShapeDtypeStruct((device_count(), *leaf.shape), dtype)

    return jax.tree.map(shape, tree)


def unreplicate(tree: Any) -> Any:
    """One device's copy of a replicated pytree, on the host."""

    def first(leaf: jax.Array) -> np.ndarray:
        return np.asarray(np.asarray(leaf.addressable_shards[0].data)[0])

    return jax.tree.map(first, tree)


def shard(batch: Any) -> Any:
    """Splits the leading axis of every array [B, ...] into [devices, B / devices, ...]."""
    devices = device_count()
    return jax.tree.map(
        lambda array: array.reshape(devices, array.shape[0] // devices, *array.shape[1:]), batch
    )


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
        self._compiled: dict[Any, tuple[Callable[..., Any], Any]] = {}

    def compile(self, *arguments: Any) -> Any:
        """Compiles for arrays, or shapes, like these; returns the shapes of the result.

        Nothing runs, so another thread may use the devices meanwhile.
        """
        return self._for_shapes(arguments)[1]

    def __call__(self, *arguments: Any) -> Any:
        return self._for_shapes(arguments)[0](*arguments)

    def _for_shapes(self, arguments: tuple[Any, ...]) -> tuple[Callable[..., Any], Any]:
        leaves, structure = jax.tree.flatten(arguments)
        key = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        with self._lock:
            if key not in self._compiled:
                lowered = self._function.lower(*arguments)
                self._compiled[key] = lowered.compile(), lowered.out_info
            return self._compiled[key]


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


def gather(tree: Any) -> Any:
    """Joins sharded results [devices, B / devices, ...] to host arrays [B, ...]."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), tree)
