"""The latency table: what each path costs on one device, in milliseconds for one image.

A predicted latency is the sum of the active paths' rows, what every image pays (stem, head, and the
controller where it runs), and what deciding costs. A path has two rows, one for cells that switch
between several and one for the others, whose weights are few and at hand.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instanas_jax import policy
from instanas_jax.search_space import MOBILENETV2_OP, SupernetSpec, uniform_architecture

FIXED_PARTS = ("stem", "head", "controller")
# What whole networks cost beyond their kernels timed alone:
# call: a call that computes nothing, without weights of paths.
# held: weights of a path as arguments of a call, whether it runs or not.
# switch, path, megabyte, several: where two or more paths of a cell are undecided, the cell, a path
#   that runs, a megabyte of its weights, and a path beyond the cell's first.
# choice: a cell that runs its one undecided path or nothing; its path runs as in a static network.
# settled_path: a path of a static network; and stem, head and controller, whose times hold it.
# `path` and `settled_path` may be less than zero, as a kernel timed alone is a program of its own;
# as warm as in a network, that costs it little.
IN_NETWORK = ("call", "held", "switch", "path", "megabyte", "several", "choice", "settled_path")


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """One device's measurements: lower deciles in milliseconds at `batch_size` images."""

    backend: str
    device: dict[str, Any]
    versions: dict[str, str]
    spec: dict[str, Any]  # `SupernetSpec.to_json` of the measured supernet.
    batch_size: int
    dtype: str
    fixed_ms: dict[str, float]  # One entry for each of `FIXED_PARTS`.
    cells_ms: np.ndarray  # [L, O], in a cell that switches: "path" and "megabyte" are in here.
    settled_ms: np.ndarray  # [L, O], in other cells: "settled_path" and "held" are in here.
    spread_ms: np.ndarray  # [L, O], interquartile range of the timed runs.
    repeats: int  # Timed calls of each path.
    in_network_ms: dict[str, float]  # One entry for each of `IN_NETWORK`.

    @property
    def several_ms(self) -> float:
        """Of each path beyond the first in a cell that switches."""
        return self.in_network_ms["several"]

    def fixed_total_ms(self, *, controller: bool) -> float:
        """What every image pays; a static architecture runs no controller."""
        parts = FIXED_PARTS if controller else FIXED_PARTS[:2]
        return self.in_network_ms["call"] + sum(self.fixed_ms[part] for part in parts)


@dataclasses.dataclass(frozen=True)
class LatencyBaselines:
    """Sums over cells, in milliseconds, that the reward's bounds are made of."""

    mobilenetv2_ms: float  # Op 0 in every cell.
    max_ms: float  # Every path on.
    min_ms: float  # The fastest architecture that is left open; see `baselines`.


def lookup(
    cells_ms: jax.Array | np.ndarray,
    mask: jax.Array | np.ndarray,
    forced_cells: np.ndarray,
    *,
    several_ms: np.ndarray | float = 0.0,
):
    """Latency of each image's cells, the empty-cell rule applied, what every image pays left out.

    Args:
      cells_ms: rows of either kind, [L, O].
      mask: [..., L, O].
      forced_cells: bool [L], `SupernetSpec.forced_cells`.
      several_ms: of each path beyond a cell's first; [L] or the same for all.

    Returns:
      Milliseconds [...].
    """
    resolved, _ = policy.resolve_empty_cells(mask, forced_cells)
    rows = jnp.sum(resolved * jnp.asarray(cells_ms, jnp.float32), axis=(-2, -1))
    beyond_first = jnp.maximum(jnp.sum(resolved, axis=-1) - 1.0, 0.0)
    return rows + jnp.sum(beyond_first * jnp.asarray(several_ms, jnp.float32), axis=-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Prices:
    """What whole images take under one policy, as what is summed up; milliseconds.

    Attributes:
      rows_ms: [L, O], of each path.
      several_ms: [L], of each path beyond a cell's first.
      constant_ms: of every image.
    """

    rows_ms: np.ndarray
    several_ms: np.ndarray
    constant_ms: float

    def cells_ms(self, mask: jax.Array | np.ndarray, forced_cells: np.ndarray):
        """As `lookup`, [...]: whole images but for `constant_ms`. May be traced."""
        return lookup(self.rows_ms, mask, forced_cells, several_ms=self.several_ms)


def prices(table: LatencyTable, settled: policy.Settled) -> Prices:
    """Of a policy.

    Args:
      settled: what the policy decides alike for every image. Cells of which nothing is left to
        decide, or whether their one path runs, do not switch; and where everything is settled the
        controller does not run.
    """
    undecided = np.sum(~(settled.on | settled.off), axis=-1)
    chooses = (undecided == 1) & ~settled.on.any(axis=-1)
    switches = (undecided > 0) & ~chooses
    rows_ms = np.where(switches[:, None], table.cells_ms, table.settled_ms)
    switches_ms = table.in_network_ms["switch"] * switches.sum()
    switches_ms += table.in_network_ms["choice"] * np.sum(chooses)
    held_ms = table.in_network_ms["held"] * np.sum(~settled.off[switches])
    fixed_ms = table.fixed_total_ms(controller=not settled.everything)
    return Prices(rows_ms, table.several_ms * switches, float(switches_ms + held_ms + fixed_ms))


def image_ms(
    table: LatencyTable,
    mask: jax.Array | np.ndarray,
    forced_cells: np.ndarray,
    settled: policy.Settled,
) -> np.ndarray:
    """Predicted milliseconds [...] of whole images under masks [..., L, O] of one policy.

    Args:
      settled: see `prices`.
    """
    of_policy = prices(table, settled)
    return np.asarray(of_policy.cells_ms(mask, forced_cells)) + of_policy.constant_ms


def static_ms(table: LatencyTable, architecture: np.ndarray, forced_cells: np.ndarray) -> float:
    """Predicted milliseconds of a whole image by one architecture [L, O], as a static network."""
    settled = policy.Settled.architecture(architecture)
    return float(image_ms(table, architecture, forced_cells, settled))


def baselines(
    table: LatencyTable, spec: SupernetSpec, settled: policy.Settled | None = None
) -> LatencyBaselines:
    """The three architectures that the bounds of the reward refer to, as static networks.

    Differs from the authors' program, whose smallest latency is that of op 4 in each group's
    first cell: where op 4 is not the fastest op, as in narrow networks on CPUs, that is no lower
    bound, and the falling upper bound may pass under it.

    Args:
      settled: what is not left to decide; by default nothing. The fastest architecture is what is
        settled to run, and of a cell that can't be empty otherwise the fastest op.
    """
    settled = settled or policy.Settled.nothing(spec.mask_shape)
    always_ms = np.sum(table.settled_ms * settled.on, axis=-1)
    fastest_ms = np.where(settled.may_run(spec.forced_cells), table.settled_ms, np.inf).min(axis=-1)
    left_open = spec.forced_cells & ~settled.on.any(axis=-1)
    mobilenetv2 = uniform_architecture(spec, MOBILENETV2_OP)
    return LatencyBaselines(
        mobilenetv2_ms=float(lookup(table.settled_ms, mobilenetv2, spec.forced_cells)),
        max_ms=float(table.settled_ms.sum()),
        min_ms=float(always_ms.sum() + fastest_ms[left_open].sum()),
    )
