"""Convolutions lowered to what each platform runs fast, with gradients of their own.

XLA's CPU backend runs a grouped convolution 5 to 30 times slower than the same sum of shifted
multiply-adds, a 1x1 convolution slower than a matrix product, and an ordinary convolution of a
2x2 map 5 to 9 times, of an image 2 times, slower than the product of its windows; accelerators
have fast native kernels for all three. Hence two lowerings, chosen by `default_lowering` or by the
caller:

  shifted   depthwise as k*k shifted multiply-adds, pointwise as a matrix product, dense as a
            matrix product where the map is small or the channels are few; elsewhere the gradient
            of its kernel alone, a product for each shift (CPU)
  native    `lax.conv_general_dilated` for all (accelerators, and the reference in tests); on GPUs
            with room around depthwise maps that need it

Images are [B, H, W, C]. Padding is k // 2 on every side. Derivatives of the shifted lowering are in
reverse mode, of any order; JAX raises a TypeError for forward mode.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from instanas_jax import fusion

Lowering = Literal["shifted", "native"]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def default_lowering() -> Lowering:
    """The faster lowering of the platform on which JAX computes by default."""
    return "shifted" if jax.default_backend() == "cpu" else "native"


# Where all windows are laid out for one product: inputs of so few channels, which are images; and
# maps up to so many pixels a side under kernels of so many values at least. Elsewhere laying out
# costs more than it saves.
_WINDOWS_UP_TO_CHANNELS = 4
_WINDOWS_UP_TO_SIZE = 2
_WINDOWS_FROM_KERNEL = 2**13


def dense(x: jax.Array, kernel: jax.Array, *, stride: int, lowering: Lowering) -> jax.Array:
    """Ordinary convolution; kernel [k, k, C_in, C_out]."""
    out_size = _out_size(x.shape[1:3], stride)
    is_small = max(out_size) <= _WINDOWS_UP_TO_SIZE and kernel.size >= _WINDOWS_FROM_KERNEL
    pays = is_small or x.shape[-1] <= _WINDOWS_UP_TO_CHANNELS
    if lowering == "native":
        return _native(x, kernel, stride, groups=1)
    if not pays:
        return _dense_shifted(x, kernel, stride)
    taps = _taps(fusion.padded(x, kernel.shape[0] // 2), kernel.shape[0], stride, out_size)
    windows = jnp.concatenate(list(taps), axis=-1)  # [B, H', W', k * k * C_in]
    return _pointwise_product(windows, kernel.reshape(-1, kernel.shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense_shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """As `_native`, whose kernel's gradient XLA takes for a convolution by a window as large as the
    map: 24 channels, 64 images of 32 pixels, in 42 ms, by a product for each tap in 13."""
    return _native(x, kernel, stride, groups=1)


def _dense_forward(x, kernel, stride):
    return _dense_shifted(x, kernel, stride), (x, kernel)


def _dense_backward(stride, residuals, gradient):
    x, kernel = residuals
    size = kernel.shape[0]
    pull_back = jax.linear_transpose(lambda x: _native(x, kernel, stride, groups=1), x)
    padded, parts = fusion.padded(x, size // 2), in_parts(gradient)
    seen = [stride * (out_size - 1) + 1 for out_size in gradient.shape[1:3]]

    # A loop, which cuts a tap when its turn comes: XLA would cut them all as early as the forward
    # pass, half a gigabyte of a supernet's update that waits for gradients.
    def tap_gradient(place: jax.Array) -> jax.Array:
        start, shape = (0, place // size, place % size, 0), (x.shape[0], *seen, x.shape[-1])
        tap = lax.dynamic_slice(padded, start, shape)[:, ::stride, ::stride]
        return parts_kernel_gradient(in_parts(tap), parts)

    kernel_gradient = lax.map(tap_gradient, jnp.arange(size * size))
    return *pull_back(gradient), kernel_gradient.reshape(kernel.shape)


_dense_shifted.defvjp(_dense_forward, _dense_backward)


def pointwise(x: jax.Array, kernel: jax.Array, *, lowering: Lowering) -> jax.Array:
    """1x1 convolution of [B, H, W, C_in] by kernel [C_in, C_out]."""
    if lowering == "native":
        return _native(x, kernel[None, None], 1, groups=1)
    return _pointwise_product(x, kernel)


def depthwise(x: jax.Array, kernel: jax.Array, *, stride: int, lowering: Lowering) -> jax.Array:
    """One k x k filter a channel: [B, H, W, C] by kernel [k, k, C]."""
    if lowering == "native":
        return _depthwise_native(x, kernel, stride)
    return _depthwise_shifted(x, kernel, stride)


def depthwise_of(
    make: Callable[[], jax.Array], kernel: jax.Array, *, stride: int, lowering: Lowering
) -> jax.Array:
    """`depthwise(make(), kernel)` of a predictor, in fewer kernels; see `fusion.in_call`."""
    if lowering == "native":
        return _depthwise_native(make(), kernel, stride)
    pad = kernel.shape[0] // 2
    padded = fusion.in_call(lambda: fusion.padded(make(), pad))
    size = tuple(padded_size - 2 * pad for padded_size in padded.shape[1:3])
    return _weighted_taps(padded, kernel, stride, _out_size(size, stride))


# On GPUs, pixels a side of the map of zeros in which one that is smaller than its kernel is laid,
# no less than a kernel. The gradient of such a kernel is, to XLA, no gradient of a kernel but a
# convolution by windows of 4 x 4, which cuDNN runs at a tenth of the speed. H200, 4 x 4 pixels,
# 5 x 5 kernel, 1440 channels, batch 256, without and with room: both gradients 1.26 and 0.42 ms,
# forward 0.04 and 0.2. Strides spread the gradient out, and XLA knows what it is.
_ROOM = 8


def _depthwise_native(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    height, width = x.shape[1:3]
    grouped = functools.partial(
        _native, kernel=kernel[:, :, None, :], stride=stride, groups=x.shape[-1]
    )
    needs_room = stride == 1 and min(height, width) < kernel.shape[0]
    if not needs_room or jax.default_backend() != "gpu":
        return grouped(x)
    room = ((0, 0), (0, max(0, _ROOM - height)), (0, max(0, _ROOM - width)), (0, 0))
    return grouped(jnp.pad(x, room))[:, :height, :width]


def _native(x: jax.Array, kernel: jax.Array, stride: int, *, groups: int) -> jax.Array:
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
    )


# A weight gradient contracts over tens of thousands of positions into a small matrix, which
# leaves a plain product one core's worth of tiles; splitting the positions fills both.
_SPLITS = 4
_SPLIT_FROM_POSITIONS = 4096


@jax.custom_vjp
def _pointwise_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("bhwi,io->bhwo", x, kernel)


def _pointwise_forward(x, kernel):
    parts = in_parts(x)
    return parts_product(parts, kernel).reshape(*x.shape[:3], -1), (parts, kernel, x.shape)


def _pointwise_backward(residuals, gradient):
    parts, kernel, shape = residuals
    gradient = in_parts(gradient)
    x_gradient = parts_product(gradient, kernel.T).reshape(shape)
    return x_gradient, parts_kernel_gradient(parts, gradient)


_pointwise_product.defvjp(_pointwise_forward, _pointwise_backward)


def in_parts(x: jax.Array) -> jax.Array:
    """[B, H, W, C] as parts of its positions, [parts, positions, C].

    All products of a training step that read a map should read it like this: a map that is read in
    two shapes is made twice, with whatever makes it.
    """
    positions = x.shape[0] * x.shape[1] * x.shape[2]
    parts = _SPLITS if positions >= _SPLIT_FROM_POSITIONS and positions % _SPLITS == 0 else 1
    return x.reshape(parts, positions // parts, x.shape[-1])


def parts_product(parts: jax.Array, kernel: jax.Array) -> jax.Array:
    """[parts, positions, I] by [I, O] to [parts, positions, O]."""
    kernels = jnp.broadcast_to(kernel, (parts.shape[0], *kernel.shape))
    return jnp.einsum("npi,nio->npo", parts, kernels)


def parts_kernel_gradient(parts: jax.Array, gradient: jax.Array) -> jax.Array:
    """[I, O], of inputs [parts, positions, I] and the outputs' gradient [parts, positions, O]."""
    return jnp.einsum("npi,npo->nio", parts, gradient).sum(0)


def _taps(padded: jax.Array, kernel_size: int, stride: int, out_size: tuple[int, int]):
    """The k*k views of [..., H, W, C] that a k x k window sees, as [..., out_h, out_w, C]."""
    lead = padded.ndim - 3
    strides = (1,) * lead + (stride, stride, 1)
    for row in range(kernel_size):
        for column in range(kernel_size):
            start = (0,) * lead + (row, column, 0)
            stop = (
                *padded.shape[:lead],
                row + (out_size[0] - 1) * stride + 1,
                column + (out_size[1] - 1) * stride + 1,
                padded.shape[-1],
            )
            yield lax.slice(padded, start, stop, strides)


def _weighted_taps(padded: jax.Array, kernel: jax.Array, stride: int, out_size) -> jax.Array:
    weights = kernel.reshape(-1, kernel.shape[-1])
    taps = _taps(padded, kernel.shape[0], stride, out_size)
    return sum(tap * weight for tap, weight in zip(taps, weights, strict=True))  # pyright: ignore


def _out_size(size: tuple[int, ...], stride: int) -> tuple[int, int]:
    height, width = size
    return (height - 1) // stride + 1, (width - 1) // stride + 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise_shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    padded = fusion.padded_once(x, kernel.shape[0] // 2)
    return _weighted_taps(padded, kernel, stride, _out_size(x.shape[1:3], stride))


def _depthwise_forward(x, kernel, stride):
    return _depthwise_shifted(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride, residuals, gradient):
    x, kernel = residuals
    size = kernel.shape[0]
    # Padded for the transposed convolution, and dilated; both halves read this one map.
    edge = size - 1 - size // 2
    ends = (
        in_size + size - 1 - edge - ((out_size - 1) * stride + 1)
        for in_size, out_size in zip(x.shape[1:3], gradient.shape[1:3], strict=True)
    )
    padding = [(0, 0, 0), *((edge, end, stride - 1) for end in ends), (0, 0, 0)]
    spread = fusion.made_once(lax.pad(gradient, jnp.zeros((), gradient.dtype), padding))
    # The transposed convolution, gathered: a flipped depthwise.
    x_gradient = _weighted_taps(spread, kernel[::-1, ::-1], 1, x.shape[1:3])
    kernel_gradient = _depthwise_kernel_gradient(
        fusion.padded(x, size // 2), spread, edge, stride, gradient.shape[1:3], size
    )
    return x_gradient, kernel_gradient.astype(kernel.dtype)


_depthwise_shifted.defvjp(_depthwise_forward, _depthwise_backward)


# Positions that one turn of the loop over a depthwise kernel's gradient sums in registers: enough
# to outweigh the turn's own cost, some 5 us.
_POSITIONS_A_TURN = 16


def _depthwise_kernel_gradient(padded, spread, edge, stride, out_size, kernel_size):
    """[k, k, C] float32, rows after rows of every image.

    What some rows add is one loop over [k, k, C] that sums over their positions in registers and
    reads nothing twice from memory. Multiplying whole maps tap by tap, and summing after that,
    takes 3 to 6 times as long.

    Args:
      padded: the input [B, H + k - 1, W + k - 1, C].
      spread: the outputs' gradient, `stride` apart and behind `edge` zeros.
      out_size: rows and columns of that gradient.
    """
    height, width = out_size
    channels = padded.shape[-1]
    rows = max(1, min(height, _POSITIONS_A_TURN // width))
    rows = next(count for count in range(rows, 0, -1) if height % count == 0)
    turns = height // rows

    # Without JAX's care for indices below zero, a third of the loop's text.
    cut = functools.partial(lax.dynamic_slice, allow_negative_indices=False)

    def add_rows(total, turn):
        image, first = turn // turns, turn % turns * rows * stride
        for row, column in itertools.product(range(rows), range(width)):
            top, left = first + row * stride, column * stride
            under = (image, top, left, 0), (1, kernel_size, kernel_size, channels)
            over = (image, edge + top, edge + left, 0), (1, 1, 1, channels)
            patch = cut(padded, *under)[0].astype(jnp.float32)
            total = total + patch * cut(spread, *over)[0].astype(jnp.float32)
        return total, None

    zeros = jnp.zeros((kernel_size, kernel_size, channels), jnp.float32)
    return lax.scan(add_rows, zeros, jnp.arange(padded.shape[0] * turns))[0]
