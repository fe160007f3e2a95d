"""Convolution with batch norm: a Flax module to train, a folded pure function to run.

In training, batch statistics span the whole global batch, over devices as well. In evaluation
the batch norm is an affine map of the convolution's output, so it is folded into the kernel
once; the supernet, the skipping execution and the latency table all run the same folded form.
"""

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

    The running variance is the unbiased one and moves by `MOMENTUM`, as in PyTorch.

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
        mean, var, count = _batch_moments(y, self.axis_name)
        unbiased = var * (count / max(count - 1, 1))
        running_mean.value = _move(running_mean.value, mean, self.kept)
        running_var.value = _move(running_var.value, unbiased, self.kept)
        gain = scale * lax.rsqrt(var + EPSILON)
        normalised = y * gain.astype(y.dtype) + (bias - mean * gain).astype(y.dtype)
        return activate(normalised, self.activation)


def keep(array: jax.Array, kept: Kept) -> jax.Array:
    """The kept ranges of the last axis, side by side."""
    if kept is None:
        return array
    return jnp.concatenate([array[..., start:stop] for start, stop in kept], axis=-1)


def _move(running: jax.Array, batch: jax.Array, kept: Kept) -> jax.Array:
    """Running statistics [C] moved towards the batch's, where channels are kept."""
    if kept is None:
        return running + MOMENTUM * (batch - running)
    offset = 0
    for start, stop in kept:
        part = batch[offset : offset + stop - start]
        running = running.at[start:stop].add(MOMENTUM * (part - running[start:stop]))
        offset += stop - start
    return running


def initialise(key: jax.Array, shapes: Any, *, linear_gain: float = 1.0) -> Any:
    """Values for a network's abstract {"params", "batch_stats"}.

    Convolutions are He normal by fan-in, linear layers normal with deviation
    linear_gain / sqrt(fan-in), scales and variances one, the rest zero. All kernels are cut from
    one draw: a random program for each tensor would take longer to compile than to train a step.
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
                filled[name] = jnp.asarray(values * np.float32(gain / np.sqrt(fan_in)))
                offset += child.size
            else:
                value = 1.0 if name in ("scale", "var") else 0.0
                filled[name] = jnp.full(child.shape, value, child.dtype)
        return filled

    return fill(shapes)


def _batch_moments(y: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array, int]:
    """Mean [C], biased variance [C] and count of the values behind each, in float32."""
    y = y.astype(jnp.float32)
    count = y.shape[0] * y.shape[1] * y.shape[2]
    mean = jnp.mean(y, axis=(0, 1, 2))
    mean_square = jnp.mean(y * y, axis=(0, 1, 2))
    if axis_name is not None:
        mean, mean_square = lax.pmean((mean, mean_square), axis_name)
        count *= lax.axis_size(axis_name)
    return mean, jnp.maximum(mean_square - mean * mean, 0.0), count


def fold(params: dict[str, Any], batch_stats: dict[str, Any]) -> Folded:
    """Folds every batch norm of a network into the convolution before it.

    Args:
      params: nested dicts; a dict with `kernel` and `scale` is one `ConvBatchNorm`.
      batch_stats: running statistics with the same nesting.

    Returns:
      The same nesting with {kernel, bias} in place of each `ConvBatchNorm`; other leaves as
      they are.
    """
    if "kernel" in params and "scale" in params:
        gain = params["scale"] * lax.rsqrt(batch_stats["var"] + EPSILON)
        return {
            "kernel": params["kernel"] * gain,
            "bias": params["bias"] - batch_stats["mean"] * gain,
        }
    return {
        name: fold(child, batch_stats.get(name, {})) if isinstance(child, dict) else child
        for name, child in params.items()
    }


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
