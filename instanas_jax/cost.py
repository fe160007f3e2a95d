"""What a network costs on paper: FLOPs of one image and trainable parameters, path by path."""

import dataclasses

import numpy as np

from instanas_jax.search_space import CANDIDATE_OPS, CellSpec, OpSpec, SupernetSpec


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs (2 a multiply-add, batch norm folded) of one image, and trainable parameters."""

    flops: int
    params: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.params + other.params)


def conv_cost(out_size: int, kernel: int, in_per_group: int, out_channels: int) -> Cost:
    """Cost of one convolution and of the batch norm after it, two parameters a channel."""
    weights = kernel * kernel * in_per_group * out_channels
    return Cost(2 * weights * out_size * out_size, weights + 2 * out_channels)


def op_cost(cell: CellSpec, op: OpSpec) -> Cost:
    """Cost of one path, its batch norms' two parameters a channel included."""
    out = cell.out_size
    if op.is_basic:
        return conv_cost(out, 3, cell.in_channels, cell.out_channels) + conv_cost(
            out, 3, cell.out_channels, cell.out_channels
        )
    hidden = cell.in_channels * op.expansion
    return (
        conv_cost(cell.in_size, 1, cell.in_channels, hidden)
        + conv_cost(out, op.kernel, 1, hidden)
        + conv_cost(out, 1, hidden, cell.out_channels)
    )


def stem_cost(spec: SupernetSpec) -> Cost:
    return conv_cost(spec.cells[0].in_size, 3, 3, spec.stem_channels)


def fixed_cost(spec: SupernetSpec) -> Cost:
    """Cost of stem and head, which every architecture pays."""
    last = spec.cells[-1]
    linear = spec.head_channels * spec.num_classes
    return (
        stem_cost(spec)
        + conv_cost(last.out_size, 1, last.out_channels, spec.head_channels)
        + Cost(2 * linear, linear + spec.num_classes)
    )


def path_costs(spec: SupernetSpec) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs [L, O] and parameters [L, O] of every path."""
    costs = [[op_cost(cell, op) for op in CANDIDATE_OPS] for cell in spec.cells]
    flops = np.array([[cost.flops for cost in row] for row in costs], np.int64)
    params = np.array([[cost.params for cost in row] for row in costs], np.int64)
    return flops, params
