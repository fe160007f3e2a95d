"""Settings: fields of dataclasses that say themselves what they mean and which values they take.

A field's metadata carries its flag's help and its allowed range, so that a setting is declared,
documented and checked in one place.
"""

import dataclasses
import math
from typing import Any

from instanas_jax.errors import InputError


def setting(
    default: Any,
    help_text: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field that is also a flag."""
    metadata = {"help": help_text, "minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def check(section: Any, *, prefix: str = "") -> None:
    """InputError for the first setting of a dataclass that is out of range.

    Args:
      prefix: of the settings' flags.
    """
    for field in dataclasses.fields(section):
        _check(f"--{prefix}{field.name}", getattr(section, field.name), field.metadata)


def listed(choices: tuple[str, ...]) -> str:
    """Choices as text; an empty one, which leaves the choice to something else, has no name."""
    return ", ".join(filter(None, choices))


def _check(flag: str, value: Any, rules: Any) -> None:
    minimum, maximum, choices = rules["minimum"], rules["maximum"], rules["choices"]
    if choices is not None and value not in choices:
        raise InputError(f"{flag}={value}: choose one of {listed(choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{flag}={value}: must be a number, and not infinite")
    if minimum is not None and value < minimum:
        raise InputError(f"{flag}={value}: must be {minimum:.10g} or more")
    if maximum is not None and value > maximum:
        raise InputError(f"{flag}={value}: must be {maximum:.10g} or less")
