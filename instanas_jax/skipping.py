"""Images through the paths of their common mask alone: what runs is traced here, and nothing else.

A cell is a `lax.switch` over what its policy may decide: a branch for each op alone, one for
several, one for none. It compiles once for all architectures, because the switches' indices are
scalars. (`vmap` would turn the branches into selects that run both sides, so images with different
masks run one after another; see `batching`.) Where a cell's decisions are settled there is no
switch, so a static network is the case in which all of them are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from instanas_jax import channels, convolution, fusion, ops, packing, policy, supernet
from instanas_jax.layers import Folded
from instanas_jax.search_space import CANDIDATE_OPS, FORCED_OP, CellSpec, Join, SupernetSpec

Weights = dict[str, Any]
_Path = Callable[[jax.Array], jax.Array]  # One op of a cell, weights inside.

_ENDS = ("stem", "head", "classifier")


def prepare_weights(
    spec: SupernetSpec, supernet_folded: Folded, settled: policy.Settled | None = None
) -> Weights:
    """Folded weights laid out a path each, so that a branch reads its own arrays whole.

    Args:
      settled: decisions that no image changes; paths that never run get no weights.
    """
    may_run = _or_nothing(spec, settled).may_run(spec.forced_cells)
    weights: Weights = {name: supernet_folded[name] for name in _ENDS}
    weights["paths"] = [
        {
            op: ops.op_weights(cell, supernet_folded[supernet.cell_name(index)], op)
            for op in channels.ALL_OPS
            if may_run[index, op]
        }
        for index, cell in enumerate(spec.cells)
    ]
    return weights


def in_branch(spec: SupernetSpec, settled: policy.Settled | None = None) -> dict[str, Any]:
    """For `packing.pack`: which of the weights of `prepare_weights` are read inside a branch."""
    always = [plan.always for plan in plans(spec, _or_nothing(spec, settled))]
    return {**dict.fromkeys(_ENDS, False), "paths": [not is_always for is_always in always]}


def apply_skipping(
    spec: SupernetSpec,
    weights: Weights,
    images: jax.Array,
    mask: jax.Array,
    *,
    lowering: convolution.Lowering,
    settled: policy.Settled | None = None,
) -> jax.Array:
    """Class logits of images that share a mask, running its paths alone.

    Args:
      weights: from `prepare_weights`.
      images: normalised [M, H, W, 3].
      mask: [1, L, O], traced.
      settled: decisions that every mask agrees with.

    Returns:
      [M, K], equal to `supernet.apply_eval` within rounding.
    """
    return apply_deciding(
        spec, weights, images, lambda _: mask, lowering=lowering, settled=settled
    )[0]


def apply_deciding(
    spec: SupernetSpec,
    weights: Weights,
    images: jax.Array,
    decide: Callable[[jax.Array], jax.Array],
    *,
    lowering: convolution.Lowering,
    settled: policy.Settled | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `apply_skipping`, under a mask that is asked for where a cell first needs it.

    Args:
      decide: gives the mask [1, L, O]; of the features that come to the first undecided cell, or of
        the class logits if there is none. What it computes runs there if it waits for them; see
        `fusion.after`.

    Returns:
      Class logits and the mask.
    """
    settled = _or_nothing(spec, settled)
    cell_plans = plans(spec, settled)
    first_undecided = np.append(np.flatnonzero(settled.undecided_cells), spec.num_cells)[0]
    ends = packing.read({name: weights[name] for name in _ENDS})

    def run_cells(cells: range, x: jax.Array, decisions: _Decisions | None = None) -> jax.Array:
        for index in cells:
            cell, plan = spec.cells[index], cell_plans[index]
            runs = _path_programs(cell, weights["paths"][index], lowering)
            if plan.always:
                x = _apply_all(runs, plan.ops, x, spec.join)
            else:
                assert decisions is not None  # Cells before the first undecided one are settled.
                x = _apply_decided(cell, plan, runs, x, decisions, index, spec.join)
        return x

    def checked(mask: jax.Array) -> jax.Array:
        chex.assert_shape(mask, (1, *spec.mask_shape))
        return mask

    x = supernet.apply_stem(spec, ends, images, lowering=lowering)
    x = run_cells(range(first_undecided), x)
    if first_undecided == spec.num_cells:
        class_logits = supernet.apply_head(ends, x, lowering=lowering)
        return class_logits, checked(decide(class_logits))
    # One mask, whether it is read here or is a result.
    mask = lax.optimization_barrier(checked(decide(x)))
    decisions = _decisions(cell_plans, spec.forced_cells, mask[0])
    x = run_cells(range(first_undecided, spec.num_cells), x, decisions)
    return supernet.apply_head(ends, x, lowering=lowering), mask


def _or_nothing(spec: SupernetSpec, settled: policy.Settled | None) -> policy.Settled:
    return policy.Settled.nothing(spec.mask_shape) if settled is None else settled


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one cell may decide.

    Attributes:
      ops: those that may run.
      alone: of these, those that may run without another.
      several: whether two or more may run together.
      none: whether the image may pass through.
      always: whether `ops` all run for every image.
    """

    ops: tuple[int, ...]
    alone: tuple[int, ...]
    several: bool
    none: bool
    always: bool


def plans(spec: SupernetSpec, settled: policy.Settled) -> list[Plan]:
    """What each cell may decide, where so much is settled."""
    may_run = settled.may_run(spec.forced_cells)
    return [
        _plan(
            running=tuple(np.flatnonzero(may_run[index]).tolist()),
            on=tuple(np.flatnonzero(settled.on[index]).tolist()),
            several=int((~settled.off[index]).sum()) > 1,
            is_settled=bool((settled.on[index] | settled.off[index]).all()),
            forces_op=cell.forces_op,
        )
        for index, cell in enumerate(spec.cells)
    ]


def _plan(
    running: tuple[int, ...],
    on: tuple[int, ...],
    *,
    several: bool,
    is_settled: bool,
    forces_op: bool,
) -> Plan:
    if is_settled:
        return Plan(running, (), several=False, none=False, always=True)
    return Plan(
        running,
        alone=running if not on else on if len(on) == 1 else (),
        several=several,
        none=not on and not forces_op,
        always=False,
    )


class _Decisions(NamedTuple):
    """What each cell of an architecture does.

    Attributes:
      codes: int32 [L], an integer with a bit for each op of the cell's plan, set where it is on.
      branches: int32 [L], the number of its branch in `_apply_decided`'s order.
    """

    codes: jax.Array
    branches: jax.Array


def _decisions(cell_plans: list[Plan], forced_cells: np.ndarray, mask: jax.Array) -> _Decisions:
    """What each cell does under a mask [L, O], the empty-cell rule applied.

    Two kernels, the second one giving the indices of all switches: what is computed cell by cell,
    or beside the chain, costs each image some microseconds.
    """
    bits = np.zeros(mask.shape, np.int32)
    for index, plan in enumerate(cell_plans):
        bits[index, list(plan.ops)] = 1 << np.arange(len(plan.ops))
    forced = np.where(forced_cells, bits[:, FORCED_OP], 0)  # `policy.resolve_empty_cells`, by bits.
    several = np.array([len(plan.alone) for plan in cell_plans], np.int32)
    none = np.array([len(plan.alone) + plan.several for plan in cell_plans], np.int32)
    # Where fewer ops run alone than may run, that is one op, or none.
    each_alone = np.array([plan.alone == plan.ops for plan in cell_plans], np.int32)

    codes = jnp.sum((mask > 0.5) * bits, axis=-1)
    # A barrier, or XLA would sum again for each switch.
    codes = lax.optimization_barrier(jnp.where(codes == 0, forced, codes))
    count = lax.population_count(codes)
    one = lax.population_count(codes - 1) * each_alone
    branches = jnp.where(count == 1, one, jnp.where(count == 0, none, several))
    return _Decisions(codes, branches)


def _path_programs(
    cell: CellSpec, paths: dict[int, Folded], lowering: convolution.Lowering
) -> dict[int, _Path]:
    def program(op: int) -> _Path:
        return lambda x: ops.apply_op(cell, CANDIDATE_OPS[op], paths[op], x, lowering=lowering)

    return {op: program(op) for op in paths}


def _apply_decided(
    cell: CellSpec,
    plan: Plan,
    runs: dict[int, _Path],
    x: jax.Array,
    decisions: _Decisions,
    index: int,
    join: Join,
) -> jax.Array:
    """A cell that is not settled under its decision, that at `index` of all.

    Most cells run one op or none: such a branch is as short as a static network's cell.
    """

    def several(x: jax.Array) -> jax.Array:
        # Cut where it is read; all cells' codes, cut before, would be kernels beside the chain.
        return _apply_several(cell, [runs[op] for op in plan.ops], x, decisions.codes[index], join)

    programs = [runs[op] for op in plan.alone]
    programs += [several] if plan.several else []
    programs += [lambda x: x] if plan.none else []
    return lax.switch(decisions.branches[index], programs, x)


def _apply_all(
    runs: dict[int, _Path], running: tuple[int, ...], x: jax.Array, join: Join
) -> jax.Array:
    if not running:
        return x
    outputs = [runs[running[0]](x)]
    for op in running[1:]:
        outputs.append(runs[op](fusion.after(x, outputs[-1])))
    total = sum(outputs[1:], start=outputs[0])
    return total * (1.0 / len(outputs)) if join == "mean" else total


def _apply_several(
    cell: CellSpec,
    runs: list[_Path],
    x: jax.Array,
    code: jax.Array,
    join: Join,
) -> jax.Array:
    """The paths whose bits are set, one after another, joined."""
    active = lax.population_count(code).astype(x.dtype)
    # Each path's last loop scales; one over their sum would be a kernel more.
    scale = ops.join_scale(active[None], join)

    def add_next(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, total = state
        # Formulas that share no term, or XLA would compute the term in a kernel of its own.
        path, rest = 31 - lax.clz(left & -left), left & (left - 1)
        added = lax.switch(
            path, [lambda x, total, run=run: total + scale * run(x) for run in runs], x, total
        )
        return rest, added

    # No constant alone in a loop, here and below: it would be a buffer at each call.
    def goes_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return lax.population_count(state[0]) > 0

    shape = (x.shape[0], cell.out_size, cell.out_size, cell.out_channels)
    nothing = jnp.full(shape, 0.0 * active)
    return lax.while_loop(goes_on, add_next, (code, nothing))[1]
