"""How training batches reach the devices: one by one, or from images that lie there already."""

from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from instanas_jax import data, parallel
from instanas_jax.errors import InputError
from instanas_jax.image_sets import Images, ImageSet

# Of an accelerator's memory; the rest is for training.
_RESIDENT_SHARE = 1 / 8


def check_batch_size(batch_size: int, *, flag: str, in_pairs: bool = False) -> None:
    """InputError unless the devices can share a batch of this size evenly.

    Args:
      in_pairs: whether neighbours in the batch must stay together (`augment.cut_mix`).
    """
    devices = parallel.device_count()
    together = 2 if in_pairs and devices > 1 else 1
    if batch_size < 1 or batch_size % (devices * together):
        pairs = " in pairs" if together > 1 else ""
        raise InputError(
            f"--{flag}={batch_size} cannot be shared evenly{pairs} by {devices} devices: choose a "
            f"multiple of {devices * together}"
        )


def is_resident(images: Images) -> bool:
    """Whether the devices keep all images for a stage: accelerators that have the room."""
    memory = parallel.memory_bytes()
    return (
        isinstance(images, ImageSet)
        and memory is not None
        and images.images.nbytes <= _RESIDENT_SHARE * memory
    )


def train_batches(
    images: Images,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    resident: bool | None = None,
) -> Generator[Any, None, None]:
    """The batches of `data.train_batches`, on the devices.

    Where the images lie on the devices, the host sends the numbers of a batch's images, 4 bytes
    each, and looks at no pixel.

    Args:
      resident: as `is_resident` says by default.

    Yields:
      {"image", "label"}, each [devices, B / devices, ...].

    Raises:
      InputError: see `data.train_batches`.
    """
    if resident is None:
        resident = is_resident(images)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "start_step": start_step,
        "num_steps": num_steps,
        "share": parallel.share(batch_size),
    }
    if resident and isinstance(images, ImageSet):
        return _from_devices(images, data.train_schedule(images, **options))
    return _from_host(data.train_batches(images, **options))


def to_devices(batch: Any) -> Any:
    """A batch of host arrays as programs take it (`parallel.shard`); on CPUs once it is there.

    JAX's CPU client runs a program whose arguments are still on their way on a thread of its own,
    and so what follows from its results. There glibc maps the temporaries anew at each call: four
    gigabytes of page faults, some ten seconds, an update of the supernet at width 1.
    """
    batch = parallel.shard(dict(batch))
    return jax.block_until_ready(batch) if jax.default_backend() == "cpu" else batch


def _from_host(batches: Generator[data.Batch, None, None]) -> Generator[Any, None, None]:
    try:
        for batch in batches:
            yield to_devices(batch)
    finally:
        batches.close()


def _from_devices(images: ImageSet, schedule: data.Schedule) -> Generator[Any, None, None]:
    everything = parallel.replicate({"image": images.images, "label": images.labels})
    take = parallel.compile_map(_take)
    for step in range(len(schedule)):
        yield take(everything, parallel.shard(schedule[step].indices.astype(np.int32)))


def _take(images: dict[str, jax.Array], indices: jax.Array) -> dict[str, jax.Array]:
    return {name: array[indices] for name, array in images.items()}
