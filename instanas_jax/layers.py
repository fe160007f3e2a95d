"""Convolution with batch norm: a Flax module to train, a folded pure function to run.

In training, batch statistics span the whole global batch, over devices as well. In evaluation
the batch norm is an affine map of the convolution's output, so it is folded into the kernel
once; the supernet, the skipping execution and the latency table all run the same folded form.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from instanas_jax import convolution

ConvKind = Literal["dense", "pointwise", "depthwise"]
Activation = Literal["none", "relu", "relu6"]
Folded = dict[str, Any]

EPSILON = 1e-5
MOMENTUM = 0.1

# The channels of a layer that run, as (start, stop) ranges; None for all of them.
Kept = tuple[tuple[int, int], ...] | None


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    if activation == "relu":
        return jnp.maximum(x, 0.0)
    if activation == "relu6":
        return jnp.clip(x, 0.0, 6.0)
    return x


def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    kind: ConvKind,
    stride: int,
    lowering: convolution.Lowering,
) -> jax.Array:
    kernel = kernel.astype(x.dtype)
    if kind == "pointwise":
        return convolution.pointwise(x[:, ::stride, ::stride], kernel, lowering=lowering)
    if kind == "depthwise":
        return convolution.depthwise(x, kernel, stride=stride, lowering=lowering)
    return convolution.dense(x, kernel, stride=stride, lowering=lowering)


class ConvBatchNorm(nn.Module):
    """Convolution without bias, batch norm over the global batch, activation; training mode.

    The running variance is the unbiased one, as in PyTorch. Statistics are left as what they move
    towards; `move` takes all of a network together.

    Attributes:
      kind: `dense`, `pointwise` (1x1) or `depthwise`.
      channels: output channels.
      kernel_size: pixels.
      stride: pixels.
      activation: applied last.
      kept: output channels that are computed; the others' parameters exist, unused. A
        depthwise layer's input holds the kept channels alone.
      lowering: see `convolution`.
      axis_name: the device axis over which statistics are averaged, if any.
    """

    kind: ConvKind
    channels: int
    kernel_size: int = 1
    stride: int = 1
    activation: Activation = "relu"
    kept: Kept = None
    lowering: convolution.Lowering = "native"
    axis_name: str | None = None

    def _kernel_shape(self, in_channels: int) -> tuple[int, ...]:
        if self.kind == "pointwise":
            return (in_channels, self.channels)
        if self.kind == "depthwise":
            return (self.kernel_size, self.kernel_size, self.channels)
        return (self.kernel_size, self.kernel_size, in_channels, self.channels)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C_in] to [B, H', W', channels that are kept]."""
        zeros, ones = nn.initializers.zeros, nn.initializers.ones  # See `initialise`.
        kernel = self.param("kernel", zeros, self._kernel_shape(x.shape[-1]))
        scale = keep(self.param("scale", ones, (self.channels,)), self.kept)
        bias = keep(self.param("bias", zeros, (self.channels,)), self.kept)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (self.channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (self.channels,))

        kernel = keep(kernel, self.kept)
        y = _convolve(x, kernel, kind=self.kind, stride=self.stride, lowering=self.lowering)
        normalised, mean, var = _batch_norm(  # pyright: ignore[reportGeneralTypeIssues]
            y, scale, bias, self.activation, self.axis_name
        )
        running_mean.value = _towards(mean, running_mean.value, self.kept)
        running_var.value = _towards(var, running_var.value, self.kept)
        return normalised


def keep(array: jax.Array, kept: Kept) -> jax.Array:
    """The kept ranges of the last axis, side by side."""
    if kept is None:
        return array
    pieces = [array[..., start:stop] for start, stop in kept]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)


def _towards(moments: jax.Array, running: jax.Array, kept: Kept) -> jax.Array:
    """What running statistics [C] move towards: themselves, where a channel is not kept."""
    if kept is None:
        return moments
    pieces, at, offset = [], 0, 0
    for start, stop in kept:
        pieces += [running[at:start], moments[offset : offset + stop - start]]
        at, offset = stop, offset + stop - start
    return jnp.concatenate([*pieces, running[at:]])


def move(running: Any, moments: Any) -> Any:
    """Running statistics, one step of `MOMENTUM` towards those that training mode returned."""
    return jax.tree.map(lambda old, new: old + MOMENTUM * (new - old), running, moments)


def initialise(key: jax.Array, shapes: Any, *, linear_gain: float = 1.0) -> Any:
    """Values, on the host, for a network's abstract {"params", "batch_stats"}.

    Convolutions are He normal by fan-in, linear layers normal with deviation
    linear_gain / sqrt(fan-in), scales and variances one, the rest zero. All kernels are cut from
    one draw: a program for each tensor would take longer to compile than to train a step.
    """
    flat = jax.tree_util.tree_flatten_with_path(shapes)[0]
    kernels = [leaf for path, leaf in flat if path[-1].key == "kernel"]
    draw = np.asarray(jax.random.normal(key, (sum(leaf.size for leaf in kernels),)))

    offset = 0

    def fill(node: dict[str, Any]) -> dict[str, Any]:
        nonlocal offset
        filled = {}
        for name, child in node.items():
            if isinstance(child, dict):
                filled[name] = fill(child)
            elif name == "kernel":
                # A depthwise kernel [k, k, C] has one input a filter: its fan-in is k * k.
                fan_in = int(np.prod(child.shape[:-1]))
                gain = np.sqrt(2.0) if "scale" in node else linear_gain
                values = draw[offset : offset + child.size].reshape(child.shape)
                filled[name] = values * np.float32(gain / np.sqrt(fan_in))
                offset += child.size
            else:
                value = 1.0 if name in ("scale", "var") else 0.0
                filled[name] = np.full(child.shape, value, child.dtype)
        return filled

    return fill(shapes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(
    y: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    activation: Activation,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch norm over the global batch, and the activation after it.

    Its gradient is written out: two sums over positions and one loop, where differentiating the
    moments leaves four loops to compile and to run. Sums are float32. No gradient flows through
    the moments that are returned.

    Args:
      y: [B, H, W, C].
      scale, bias: [C].

    Returns:
      [B, H, W, C], and the batch's mean and unbiased variance, [C] float32.
    """
    return _batch_norm_forward(y, scale, bias, activation, axis_name)[0]


def _sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=(0, 1, 2))


def _over_devices(sums: Any, axis_name: str | None) -> Any:
    return sums if axis_name is None else lax.psum(sums, axis_name)


def _together(rows: list[jax.Array]) -> jax.Array:
    """[rows, C] by one small loop, rather than by one a row."""
    return lax.optimization_barrier(jnp.stack(rows))


def _batch_norm_forward(y, scale, bias, activation, axis_name):
    exact = y.astype(jnp.float32)
    sums, square_sums = _over_devices((_sums(exact), _sums(exact * exact)), axis_name)
    count = y.size // y.shape[-1] * (1 if axis_name is None else lax.axis_size(axis_name))
    mean = sums / count
    var = jnp.maximum(square_sums / count - mean * mean, 0.0)
    inverse = lax.rsqrt(var + EPSILON)
    gain = scale * inverse
    rows = _together([mean, var * (count / max(count - 1, 1)), inverse, gain, bias - mean * gain])
    mean, unbiased, _, gain, shift = rows
    normalised = y * gain.astype(y.dtype) + shift.astype(y.dtype)
    return (activate(normalised, activation), mean, unbiased), (y, rows, count)


def _batch_norm_backward(activation, axis_name, residuals, gradients):
    y, rows, count = residuals
    mean, _, inverse, gain, shift = rows
    gradient = gradients[0]
    if activation != "none":
        normalised = y * gain.astype(y.dtype) + shift.astype(y.dtype)
        passes = normalised > 0.0
        if activation == "relu6":
            passes &= normalised < 6.0
        gradient = jnp.where(passes, gradient, 0.0)
    exact, centred = gradient.astype(jnp.float32), y.astype(jnp.float32) - mean
    of_bias, of_scale = _sums(exact), _sums(exact * centred)
    # Each device's loss reaches every device's y through the moments.
    whole_bias, whole_scale = _over_devices((of_bias, of_scale), axis_name)
    offset, slope = _together([whole_bias / count, inverse * inverse * whole_scale / count])
    y_gradient = gain * (exact - offset - slope * centred)
    return y_gradient.astype(y.dtype), of_scale * inverse, of_bias


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def fold(params: dict[str, Any], batch_stats: dict[str, Any]) -> Folded:
    """Folds every batch norm of a network into the convolution before it.

    Host arrays stay on the host.

    Args:
      params: nested dicts; a dict with `kernel` and `scale` is one `ConvBatchNorm`.
      batch_stats: running statistics with the same nesting.

    Returns:
      The same nesting with {kernel, bias} in place of each `ConvBatchNorm`; other leaves as
      they are.
    """
    if "kernel" in params and "scale" in params:
        gain = params["scale"] * _inverse_deviation(batch_stats["var"])
        return {
            "kernel": params["kernel"] * gain,
            "bias": params["bias"] - batch_stats["mean"] * gain,
        }
    return {
        name: fold(child, batch_stats.get(name, {})) if isinstance(child, dict) else child
        for name, child in params.items()
    }


def _inverse_deviation(var: Any) -> Any:
    if isinstance(var, np.ndarray):
        return 1.0 / np.sqrt(var + np.float32(EPSILON))
    return lax.rsqrt(var + EPSILON)


def conv_bias(
    x: jax.Array,
    folded: Folded,
    *,
    kind: ConvKind,
    stride: int = 1,
    activation: Activation = "relu",
    lowering: convolution.Lowering,
) -> jax.Array:
    """The folded form of `ConvBatchNorm`: convolution, bias, activation."""
    y = _convolve(x, folded["kernel"], kind=kind, stride=stride, lowering=lowering)
    return activate(y + folded["bias"].astype(y.dtype), activation)
