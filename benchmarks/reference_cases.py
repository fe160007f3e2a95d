"""Numbers against a reference's: one comparison, its error, and whether that is small enough."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from instanas_jax.errors import InputError

TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison; `worst` names the tensor behind the error where there are many."""

    name: str
    error: float
    tolerance: float = TOLERANCE
    worst: str = ""

    @property
    def passes(self) -> bool:
        return self.error <= self.tolerance  # False for NaN.


def relative_error(ours: Any, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference, in float64.

    Raises:
      InputError: the shapes differ.
    """
    left, right = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if left.shape != right.shape:
        raise InputError(f"the reference has shape {list(right.shape)}, ours {list(left.shape)}")
    return float(np.linalg.norm(left - right) / max(np.linalg.norm(right), 1e-30))


def compare_norms(
    name: str,
    tensors: Mapping[str, np.ndarray],
    norms: Mapping[str, float],
    *,
    tolerance: float,
    worst_tolerance: float,
    floor: float = 0.0,
) -> Iterator[Case]:
    """Three cases: the vector of all norms, the norms' median error, and the largest.

    Args:
      name: of the first case; the others add `_median` and `_worst`.
      tensors: ours, by the original's names.
      norms: the original's L2 norms of the same tensors.
      tolerance: of the vector and of the median.
      worst_tolerance: of the largest error.
      floor: share of the largest norm; a smaller norm's error is taken relative to that much.

    Raises:
      InputError: a tensor is on one side alone.
    """
    unmatched = sorted(set(tensors) ^ set(norms))
    if unmatched:
        side = "our network" if unmatched[0] in tensors else "the manifest"
        raise InputError(f"{name}: tensor '{unmatched[0]}' is in {side} alone")
    names = sorted(norms)
    theirs = np.array([norms[tensor] for tensor in names])
    ours = np.array([np.linalg.norm(tensors[tensor].astype(np.float64)) for tensor in names])
    yield Case(name, relative_error(ours, theirs), tolerance)

    errors = np.abs(ours - theirs) / np.maximum(theirs, max(floor * theirs.max(), 1e-30))
    yield Case(f"{name}_median", float(np.median(errors)), tolerance)
    worst = int(np.argmax(errors))  # The first NaN, if there is one.
    yield Case(f"{name}_worst", float(errors[worst]), worst_tolerance, names[worst])
