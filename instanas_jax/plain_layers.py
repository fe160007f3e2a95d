"""A network's layers as plain arrays, for runtimes other than JAX's: planes first, as theirs."""

import dataclasses
from typing import Any

import numpy as np

from instanas_jax import channels
from instanas_jax.search_space import CellSpec


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution, batch norm folded in, padded by half of its kernel.

    Attributes:
      kernel: [C_out, C_in / groups, k, k].
      bias: [C_out].
      activation: `none`, `relu` or `relu6`.
    """

    kernel: np.ndarray
    bias: np.ndarray
    stride: int
    groups: int
    activation: str


@dataclasses.dataclass(frozen=True)
class Path:
    """One op of a cell: its layers, and whether the cell's input is added to what they give."""

    convs: tuple[Conv, ...]
    adds_input: bool


def path(cell: CellSpec, op: int, weights: dict[str, Any]) -> Path:
    """One op of a cell, of weights as `skipping.prepare_weights` gives them."""
    if op == channels.BASIC_OP:
        first = conv(weights["first"], stride=cell.stride)
        return Path((first, conv(weights["second"], activation="relu6")), adds_input=False)
    return Path(
        (
            conv(weights["expand"]),
            conv(weights["depthwise"], stride=cell.stride, groups=channels.hidden(cell, op)),
            conv(weights["project"], activation="none"),
        ),
        adds_input=cell.has_residual,
    )


def conv(
    folded: dict[str, Any], *, stride: int = 1, groups: int = 1, activation: str = "relu"
) -> Conv:
    """Of a folded kernel: dense [k, k, C_in, C_out], pointwise [C_in, C_out] or depthwise
    [k, k, C]."""
    kernel = np.asarray(folded["kernel"])
    if kernel.ndim == 2:
        kernel = kernel[None, None]
    elif kernel.ndim == 3:
        kernel = kernel[:, :, None]
    kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    return Conv(kernel, np.asarray(folded["bias"]), stride, groups, activation)
