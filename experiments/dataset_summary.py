"""What must be known of a data set to use a network that learnt it: `dataset.json` of a run."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from experiments.workdir import write_json
from instanas_jax import data
from instanas_jax.errors import InputError

SCHEMA_VERSION = 1
CHANNELS = 3  # Red, green, blue; a grey image repeats itself.


@dataclasses.dataclass(frozen=True)
class DatasetSummary:
    """A data set without its images; mean and std are of pixels scaled to [0, 1]."""

    name: str
    class_names: tuple[str, ...]  # [K]
    image_size: int  # Height, and width, in pixels.
    channels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train_images: int


def keep(dataset: data.Dataset, path: Path) -> None:
    """Writes the summary, whole or not at all, where there is none yet.

    Raises:
      InputError: the file cannot be written.
    """
    if path.exists():
        return
    summary = DatasetSummary(
        name=dataset.name,
        class_names=dataset.class_names,
        image_size=dataset.image_size,
        channels=CHANNELS,
        mean=dataset.mean,
        std=dataset.std,
        train_images=len(dataset.train),
    )
    try:
        write_json(path, {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(summary)})
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): name a --workdir that can"
        ) from error


def load(path: Path) -> DatasetSummary:
    """Reads what `keep` wrote; InputError where it is absent, damaged or makes no sense."""
    again = "repeat the command of the run, which writes it and trains nothing twice"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist (runs of older versions lack it): {again}"
        ) from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): check its permissions"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): delete it and {again}") from error
    try:
        summary = _parse(values)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} lacks or misstates a field ({error}): delete it and {again}"
        ) from error
    return summary


def _parse(values: Any) -> DatasetSummary:
    """KeyError, TypeError or ValueError where a field is absent or wrong."""
    if values["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {values['schema_version']}, not {SCHEMA_VERSION}")
    fields = {field.name: values[field.name] for field in dataclasses.fields(DatasetSummary)}
    for name in ("class_names", "mean", "std"):
        fields[name] = tuple(fields[name])
    summary = DatasetSummary(**fields)
    if (
        summary.channels != CHANNELS
        or len(summary.mean) != CHANNELS
        or len(summary.std) != CHANNELS
    ):
        raise ValueError(f"{summary.channels} channels, networks here have {CHANNELS}")
    if not summary.train_images >= 1:
        raise ValueError(f"train_images is {summary.train_images}")
    if not all(math.isfinite(mean) for mean in summary.mean):
        raise ValueError(f"mean is {summary.mean}")
    if not all(0.0 < std < math.inf for std in summary.std):
        raise ValueError(f"std is {summary.std}")
    if not all(isinstance(name, str) for name in summary.class_names):
        raise ValueError("class_names holds something else than text")
    return summary
