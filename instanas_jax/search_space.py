"""The search space: which cells a supernet has, and which ops each cell offers.

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
ControllerKind = Literal["residual_small", "residual_large", "patches"]
CONTROLLERS: tuple[ControllerKind, ...] = ("residual_small", "residual_large", "patches")


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """One candidate op. An expansion of 0 marks the BasicConv op, which has no bottleneck."""

    name: str
    kernel: int
    expansion: int

    @property
    def is_basic(self) -> bool:
        return self.expansion == 0

    @property
    def short_name(self) -> str:
        """`k3e6` for kernel 3 and expansion 6; `basic`."""
        return "basic" if self.is_basic else f"k{self.kernel}e{self.expansion}"


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
    controller_pool: int = 1  # The controller sees the mean of every pool x pool pixels.

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

# Classes are those of the published data sets; `preset` replaces them.
_PRESETS = {
    "px32": SupernetSpec("px32", 32, 100, _SMALL_IMAGE_GROUPS),
    "px64": SupernetSpec("px64", 64, 200, _PUBLISHED_GROUPS),
    "px224": SupernetSpec(
        "px224",
        224,
        1000,
        _PUBLISHED_GROUPS,
        stem_stride=2,
        head_dropout=0.5,
        controller="residual_large",
        controller_pool=2,
    ),
    "tiny": SupernetSpec(
        "tiny",
        32,
        10,
        (GroupSpec(8, 1, 1), GroupSpec(16, 2, 2), GroupSpec(24, 1, 1)),
        stem_channels=8,
        stem_stride=2,
        head_channels=32,
        controller_channels=4,
        controller_pool=2,
    ),
}
PRESETS = tuple(_PRESETS)


def preset(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    stem_stride: int | None = None,
    join: Join = "sum",
    head_channels: int | None = None,
    controller: ControllerKind | None = None,
    controller_channels: int | None = None,
    controller_pool: int | None = None,
) -> SupernetSpec:
    """A named spec: `px32`, `px64`, `px224` as published, or `tiny` (4 cells, for tests).

    Args:
      name: one of `PRESETS`.
      num_classes: `K`.
      width: multiplies every channel count but the controller's; channels are rounded to
        multiples of 8, and the head is not narrower than the preset's (MobileNetV2's rules).
      stem_stride: replaces the preset's stride of the stem; 2 quarters the cost of every cell.
      join: see `SupernetSpec`.
      head_channels: replaces the width of the last layer before the classifier, as it is.
      controller: replaces the kind of controller.
      controller_channels: replaces the width of the controller's first layer.
      controller_pool: replaces the factor by which the controller's images shrink.

    Raises:
      InputError: an argument is out of range.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset '{name}': choose one of {', '.join(PRESETS)}")
    if num_classes < 2:
        raise InputError(f"num_classes={num_classes}: a classifier needs at least 2 classes")
    if not 0.1 <= width <= 4.0:
        raise InputError(f"width={width}: choose a width multiplier from 0.1 to 4.0")
    for setting, value, choices in (
        ("join", join, JOINS),
        ("stem_stride", stem_stride, (None, 1, 2)),
        ("controller", controller, (None, *CONTROLLERS)),
        ("controller_pool", controller_pool, (None, 1, 2, 4)),
    ):
        if value not in choices:
            allowed = ", ".join(str(choice) for choice in choices if choice is not None)
            raise InputError(f"{setting}={value}: choose one of {allowed}")
    for setting, value in (
        ("head_channels", head_channels),
        ("controller_channels", controller_channels),
    ):
        if value is not None and value < 1:
            raise InputError(f"{setting}={value}: choose 1 or more")
    spec = _PRESETS[name]
    return dataclasses.replace(
        spec,
        num_classes=num_classes,
        join=join,
        groups=tuple(
            dataclasses.replace(group, channels=_round_channels(group.channels * width))
            for group in spec.groups
        ),
        stem_channels=_round_channels(spec.stem_channels * width),
        stem_stride=stem_stride or spec.stem_stride,
        head_channels=head_channels or _round_channels(spec.head_channels * max(1.0, width)),
        controller=controller or spec.controller,
        controller_channels=controller_channels or spec.controller_channels,
        controller_pool=controller_pool or spec.controller_pool,
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
