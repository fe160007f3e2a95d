"""The search space: which cells a supernet has, which ops each cell offers, and what they cost.

Source: InstaNAS (arXiv 1811.10201), section 4.1; MobileNetV2 (arXiv 1801.04381), table 2.
Letters used everywhere: `L` cells, `O` candidate ops, `K` classes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from instanas_jax.errors import InputError

Join = Literal["sum", "mean"]
JOINS: tuple[Join, ...] = ("sum", "mean")
ControllerKind = Literal["residual_small", "residual_large"]


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """One candidate op. An expansion of 0 marks the BasicConv op, which has no bottleneck."""

    name: str
    kernel: int
    expansion: int

    @property
    def is_basic(self) -> bool:
        return self.expansion == 0


CANDIDATE_OPS: tuple[OpSpec, ...] = (
    OpSpec("mbconv_k3_e6", kernel=3, expansion=6),
    OpSpec("mbconv_k3_e3", kernel=3, expansion=3),
    OpSpec("mbconv_k5_e6", kernel=5, expansion=6),
    OpSpec("mbconv_k5_e3", kernel=5, expansion=3),
    OpSpec("basic_conv", kernel=3, expansion=0),
)
NUM_OPS = len(CANDIDATE_OPS)
MOBILENETV2_OP = 0
FORCED_OP = 4  # Runs in an empty cell that cannot be the identity.


def op_index(name: str) -> int:
    """Position of the op called `name`.

    Raises:
      InputError: no op has that name.
    """
    names = [op.name for op in CANDIDATE_OPS]
    if name not in names:
        raise InputError(f"unknown op '{name}': choose one of {', '.join(names)}")
    return names.index(name)


@dataclasses.dataclass(frozen=True)
class CellSpec:
    """One cell: its position's shapes, not its weights. Sizes are in pixels of a square map."""

    in_channels: int
    out_channels: int
    stride: int
    in_size: int
    forces_op: bool  # First cell of a group: its shape may change, so it can't be the identity.

    @property
    def out_size(self) -> int:
        return (self.in_size - 1) // self.stride + 1

    @property
    def has_residual(self) -> bool:
        """MobileNetV2's rule for the MBConv ops; BasicConv never adds its input."""
        return self.stride == 1 and self.in_channels == self.out_channels


@dataclasses.dataclass(frozen=True)
class GroupSpec:
    """Consecutive cells of one width; only the first strides."""

    channels: int
    cells: int
    stride: int


@dataclasses.dataclass(frozen=True)
class SupernetSpec:
    """Everything that fixes the function of a supernet and the shapes of its controller.

    `join` says how a cell's active paths become its output. `sum` is the paper's. Each active
    MBConv path adds the cell's input, so a sum grows with every path that is on, by up to 4 a cell,
    and batch norm sees images of very different scales side by side. `mean`, the join of
    FractalNet's drop-path (arXiv 1605.07648, section 3), keeps the scale whatever the mask, and
    a supernet then survives path dropout after a few epochs rather than hundreds.
    """

    name: str
    image_size: int
    num_classes: int
    groups: tuple[GroupSpec, ...]
    join: Join = "sum"
    stem_channels: int = 32
    stem_stride: int = 1
    head_channels: int = 1280
    head_dropout: float = 0.0
    controller: ControllerKind = "residual_small"
    controller_channels: int = 16

    @property
    def cells(self) -> tuple[CellSpec, ...]:
        return tuple(self._walk_cells())

    def _walk_cells(self) -> Iterator[CellSpec]:
        channels = self.stem_channels
        size = (self.image_size - 1) // self.stem_stride + 1
        for group in self.groups:
            for position in range(group.cells):
                first = position == 0
                cell = CellSpec(channels, group.channels, group.stride if first else 1, size, first)
                yield cell
                channels, size = cell.out_channels, cell.out_size

    @property
    def num_cells(self) -> int:
        return sum(group.cells for group in self.groups)

    @property
    def forced_cells(self) -> np.ndarray:
        """Bool [L]: cells in which `FORCED_OP` runs when an image's mask leaves them empty."""
        return np.array([cell.forces_op for cell in self.cells])

    @property
    def mask_shape(self) -> tuple[int, int]:
        return (self.num_cells, NUM_OPS)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; equal specs give equal dicts."""
        values = dataclasses.asdict(self)
        values["groups"] = [list(dataclasses.astuple(group)) for group in self.groups]
        values["ops"] = [op.name for op in CANDIDATE_OPS]
        return values


_PUBLISHED_GROUPS = (
    GroupSpec(16, 1, 1),
    GroupSpec(24, 2, 2),
    GroupSpec(32, 3, 2),
    GroupSpec(64, 4, 2),
    GroupSpec(96, 3, 1),
    GroupSpec(160, 3, 2),
    GroupSpec(320, 1, 1),
)
_SMALL_IMAGE_GROUPS = (GroupSpec(16, 1, 1), GroupSpec(24, 2, 1), *_PUBLISHED_GROUPS[2:])

PRESETS = ("px32", "px64", "px224", "tiny")


def preset(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    stem_stride: int | None = None,
    join: Join = "sum",
    controller_channels: int | None = None,
) -> SupernetSpec:
    """A named spec: `px32`, `px64`, `px224` as published, or `tiny` (4 cells, for tests).

    Args:
      name: one of `PRESETS`.
      num_classes: `K`.
      width: multiplies every channel count but the controller's; channels are rounded to
        multiples of 8, and the head is not shrunk under 1280 (both MobileNetV2's rules).
      controller_channels: replaces the preset's width of the controller's first segment.
      join: see `SupernetSpec`.
      stem_stride: replaces the preset's stride of the stem; 2 quarters the cost of every cell.

    Raises:
      InputError: an argument is out of range.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset '{name}': choose one of {', '.join(PRESETS)}")
    if num_classes < 2:
        raise InputError(f"num_classes={num_classes}: a classifier needs at least 2 classes")
    if not 0.1 <= width <= 4.0:
        raise InputError(f"width={width}: choose a width multiplier from 0.1 to 4.0")
    if stem_stride not in (None, 1, 2):
        raise InputError(f"stem_stride={stem_stride}: choose 1 or 2")
    if name == "px32":
        spec = SupernetSpec(name, 32, num_classes, _SMALL_IMAGE_GROUPS)
    elif name == "px64":
        spec = SupernetSpec(name, 64, num_classes, _PUBLISHED_GROUPS)
    elif name == "px224":
        spec = SupernetSpec(
            name,
            224,
            num_classes,
            _PUBLISHED_GROUPS,
            stem_stride=2,
            head_dropout=0.5,
            controller="residual_large",
        )
    else:
        groups = (GroupSpec(8, 1, 1), GroupSpec(16, 2, 2), GroupSpec(24, 1, 1))
        spec = SupernetSpec(
            name,
            32,
            num_classes,
            groups,
            stem_channels=8,
            stem_stride=2,
            head_channels=32,
            controller_channels=4,
        )
    if join not in JOINS:
        raise InputError(f"join={join}: choose one of {', '.join(JOINS)}")
    if controller_channels is not None and controller_channels < 1:
        raise InputError(f"controller_channels={controller_channels}: choose 1 or more")
    spec = dataclasses.replace(
        spec, join=join, controller_channels=controller_channels or spec.controller_channels
    )
    return _scale(spec, width=width, stem_stride=stem_stride)


def _scale(spec: SupernetSpec, *, width: float, stem_stride: int | None) -> SupernetSpec:
    return dataclasses.replace(
        spec,
        groups=tuple(
            dataclasses.replace(group, channels=_round_channels(group.channels * width))
            for group in spec.groups
        ),
        stem_channels=_round_channels(spec.stem_channels * width),
        stem_stride=stem_stride or spec.stem_stride,
        head_channels=_round_channels(spec.head_channels * max(1.0, width)),
    )


def _round_channels(channels: float) -> int:
    """Nearest multiple of 8, at least 8, never more than 10 % under `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def uniform_architecture(spec: SupernetSpec, op: int) -> np.ndarray:
    """The architecture [L, O] that runs op `op` alone in every cell."""
    architecture = np.zeros(spec.mask_shape, np.float32)
    architecture[:, op] = 1.0
    return architecture


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


def fixed_cost(spec: SupernetSpec) -> Cost:
    """Cost of stem and head, which every architecture pays."""
    last = spec.cells[-1]
    stem_size = spec.cells[0].in_size
    linear = spec.head_channels * spec.num_classes
    return (
        conv_cost(stem_size, 3, 3, spec.stem_channels)
        + conv_cost(last.out_size, 1, last.out_channels, spec.head_channels)
        + Cost(2 * linear, linear + spec.num_classes)
    )


def cost_table(spec: SupernetSpec) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs [L, O] and parameters [L, O] of every path."""
    costs = [[op_cost(cell, op) for op in CANDIDATE_OPS] for cell in spec.cells]
    flops = np.array([[cost.flops for cost in row] for row in costs], np.int64)
    params = np.array([[cost.params for cost in row] for row in costs], np.int64)
    return flops, params
