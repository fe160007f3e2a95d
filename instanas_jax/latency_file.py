"""A latency table as a file: JSON, of one supernet and one device."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from instanas_jax import files, latency
from instanas_jax.errors import InputError
from instanas_jax.search_space import SupernetSpec

SCHEMA_VERSION = 4
MEASURE_ANEW = (
    "measure one with `python -m experiments.profile --output=FILE` and what flags of the network "
    "and --inference_threads this command has, or leave --latency_table out"
)
_GRIDS = ("cells_ms", "settled_ms", "spread_ms")  # Fields of shape [L, O].
_MAY_SAVE = ("path", "settled_path")  # Of `latency.IN_NETWORK`, what may be less than zero.


def save(table: latency.LatencyTable, path: str | os.PathLike[str]) -> None:
    """Writes the table as JSON, whole or not at all."""
    values = dataclasses.asdict(table)
    for name in _GRIDS:
        values[name] = np.round(values[name], 6).tolist()
    text = json.dumps({"schema_version": SCHEMA_VERSION, **values}, indent=1)
    files.write_text(path, text + "\n")


def load(
    path: str | os.PathLike[str],
    spec: SupernetSpec,
    *,
    device: dict[str, Any] | None = None,
    allow_foreign: bool = False,
    advice: str = MEASURE_ANEW,
) -> latency.LatencyTable:
    """Reads a table and checks that it is of this supernet and of this device.

    Args:
      path: a file that `save` wrote.
      spec: the supernet that is to be searched.
      device: `environment.describe_device()`; None skips the check of the device.
      allow_foreign: accept another device's table, to search for that device from here.
      advice: what errors tell to do.

    Raises:
      InputError: no such file, not a table, or a table of something else.
    """
    try:
        table = _table(_read(path))
        _check_spec(table.spec, json.loads(json.dumps(spec.to_json())))
    except _Fault as fault:
        raise InputError(f"latency table {path} {fault}: {advice}") from None
    if device is not None and not allow_foreign and table.device != device:
        raise InputError(
            f"latency table {path} was measured on {_device_name(table.device)}, this is "
            f"{_device_name(device)}: {advice}, or pass --allow_foreign_table to search for that "
            "device"
        )
    return table


class _Fault(Exception):
    """What is wrong with a file, as the rest of a sentence about it."""


def _read(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise _Fault(f"cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise _Fault(f"is not JSON ({error})") from None


def _table(values: Any) -> latency.LatencyTable:
    """Of what a file holds, as far as it is a table of this program's."""
    try:
        version = values.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise _Fault(f"has schema_version {version}, this program reads {SCHEMA_VERSION}")
        grids = {name: np.asarray(values[name], np.float64) for name in _GRIDS}
        sums = {
            name: {part: float(time) for part, time in dict(values[name]).items()}
            for name in ("fixed_ms", "in_network_ms")
        }
        device = dict(values["device"])
        table = latency.LatencyTable(**{**values, **grids, **sums, "device": device})
        shape = (sum(group[1] for group in table.spec["groups"]), len(table.spec["ops"]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _Fault(f"lacks or misstates a field ({error})") from None
    if table.batch_size != 1:
        raise _Fault(f"is of batches of {table.batch_size} images, this program reads those of one")
    _check_shapes(table, shape)
    _check_times(table)
    return table


def _check_shapes(table: latency.LatencyTable, shape: tuple[int, int]) -> None:
    grids = {name: getattr(table, name).shape for name in _GRIDS}
    parts = sorted(table.fixed_ms), sorted(table.in_network_ms)
    wanted = sorted(latency.FIXED_PARTS), sorted(latency.IN_NETWORK)
    if set(grids.values()) != {shape} or parts != wanted:
        shapes = ", ".join(f"{name} {list(found)}" for name, found in grids.items())
        raise _Fault(
            f"holds grids of shapes {shapes}, fixed_ms {parts[0]}, in_network_ms {parts[1]}; its "
            f"spec needs {list(shape)}, {wanted[0]} and {wanted[1]}"
        )


def _check_times(table: latency.LatencyTable) -> None:
    times = [
        *table.fixed_ms.values(),
        *(time for name in _GRIDS for time in getattr(table, name).flat),
        *(time for name, time in table.in_network_ms.items() if name not in _MAY_SAVE),
    ]
    finite = np.isfinite([*times, *table.in_network_ms.values()]).all()
    if not (finite and min(times) >= 0.0 and table.settled_ms.max() > 0.0):
        raise _Fault("holds a time that is no time")


def _check_spec(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    # The classifier is in the head's time, but no cell depends on it.
    differing = sorted(
        name
        for name in {*wanted, *found}
        if found.get(name) != wanted.get(name) and name != "num_classes"
    )
    if differing:
        parts = "; ".join(
            f"{name} is {found.get(name)} there, {wanted.get(name)} here" for name in differing
        )
        raise _Fault(f"is of another supernet ({parts})")


def _device_name(device: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(device.items()))
