"""Where a cell's ops lie: which channels of the layers that its MBConv ops share are whose.

The expansions of all MBConv ops are one wide layer, their depthwise kernels one layer a kernel
size; see `ops`. `CANDIDATE_OPS` lists ops of one kernel size together, so each size is one range.
"""

import itertools

from instanas_jax import layers
from instanas_jax.search_space import CANDIDATE_OPS, CellSpec

ALL_OPS = tuple(range(len(CANDIDATE_OPS)))
MBCONV_OPS = tuple(index for index in ALL_OPS if not CANDIDATE_OPS[index].is_basic)
BASIC_OP = next(index for index in ALL_OPS if CANDIDATE_OPS[index].is_basic)
_KERNELS = tuple(
    (kernel, tuple(group))
    for kernel, group in itertools.groupby(MBCONV_OPS, lambda op: CANDIDATE_OPS[op].kernel)
)


def hidden(cell: CellSpec, op: int) -> int:
    """Channels of an MBConv op between its expansion and its projection."""
    return cell.in_channels * CANDIDATE_OPS[op].expansion


def width(cell: CellSpec, ops: tuple[int, ...]) -> int:
    """Channels of some ops side by side."""
    return sum(hidden(cell, op) for op in ops)


def ranges(cell: CellSpec, ops: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """Range of channels (start, stop) of each op where `ops` lie side by side."""
    stops = list(itertools.accumulate(hidden(cell, op) for op in ops))
    starts = [0, *stops[:-1]]
    return {op: (start, stop) for op, start, stop in zip(ops, starts, stops, strict=True)}


def groups(enabled: tuple[int, ...]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Of the enabled MBConv ops, a row a kernel size: the size, those that have it, and all ops
    that have it, which share a layer."""
    rows = [
        (kernel, tuple(op for op in group if op in enabled), group) for kernel, group in _KERNELS
    ]
    return [row for row in rows if row[1]]


def kept(cell: CellSpec, ops: tuple[int, ...], running: tuple[int, ...]) -> layers.Kept:
    """The channels of some ops where `ops` lie side by side, neighbours as one range: every range
    is cut and laid side by side anew, a small program each, in both directions."""
    if running == ops:
        return None
    of_op = ranges(cell, ops)
    merged: list[tuple[int, int]] = []
    for start, stop in (of_op[op] for op in running):
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return tuple(merged)
