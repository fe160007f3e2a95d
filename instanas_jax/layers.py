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

from instanas_jax import batch_norm, convolution, packing
from instanas_jax.batch_norm import EPSILON, Activation, activate

ConvKind = Literal["dense", "pointwise", "depthwise"]
Folded = dict[str, Any]

MOMENTUM = 0.1
# Outputs for each input from which a product's moments are taken from its input's.
_WIDENS_BY = 3

# The channels of a layer that run, as (start, stop) ranges; None for all of them.
Kept = tuple[tuple[int, int], ...] | None


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


def dropout(keys: jax.Array, features: jax.Array, *, rate: float) -> jax.Array:
    """Dropout in training, of every image by a key of its own, wherever in the batch it stands.

    Args:
      keys: [B] typed keys.
      features: [B, C].
      rate: the share that becomes 0.
    """
    keep = 1.0 - rate
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, features.shape[1:]))(keys)
    return jnp.where(kept, features / keep, 0.0)


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
      parts: of a widening pointwise layer, channels of each of several outputs, in place of one
        that would be cut.
      lowering: see `convolution`.
      axis_name: the device axis over which statistics are averaged, if any.
    """

    kind: ConvKind
    channels: int
    kernel_size: int = 1
    stride: int = 1
    activation: Activation = "relu"
    kept: Kept = None
    parts: tuple[int, ...] = ()
    lowering: convolution.Lowering = "native"
    axis_name: str | None = None

    def _kernel_shape(self, in_channels: int) -> tuple[int, ...]:
        if self.kind == "pointwise":
            return (in_channels, self.channels)
        if self.kind == "depthwise":
            return (self.kernel_size, self.kernel_size, self.channels)
        return (self.kernel_size, self.kernel_size, in_channels, self.channels)

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        """[B, H, W, C_in] to [B, H', W', channels that are kept], or a list of them by `parts`."""
        zeros, ones = nn.initializers.zeros, nn.initializers.ones  # See `initialise`.
        kernel = keep(self.param("kernel", zeros, self._kernel_shape(x.shape[-1])), self.kept)
        scale = keep(self.param("scale", ones, (self.channels,)), self.kept)
        bias = keep(self.param("bias", zeros, (self.channels,)), self.kept)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (self.channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (self.channels,))

        end = (self.activation, self.axis_name)
        if self.kind == "pointwise" and kernel.shape[-1] >= _WIDENS_BY * kernel.shape[0]:
            weights = (split(array, self.parts) for array in (kernel, scale, bias))
            outputs, *moments = zip(
                *(
                    batch_norm.product_batch_norm(x[:, :: self.stride, :: self.stride], *part, *end)
                    for part in zip(*weights, strict=True)
                ),
                strict=True,
            )
            mean, var = (jnp.concatenate(part) for part in moments)
        else:
            y = _convolve(x, kernel, kind=self.kind, stride=self.stride, lowering=self.lowering)
            output, mean, var = batch_norm.batch_norm(y, scale, bias, *end)  # pyright: ignore
            outputs = split(output, self.parts)
        running_mean.value = _towards(mean, running_mean.value, self.kept)
        running_var.value = _towards(var, running_var.value, self.kept)
        return list(outputs) if self.parts else outputs[0]


def split(array: jax.Array, channels: tuple[int, ...]) -> list[jax.Array]:
    """Cuts of the last axis; all of it where there are no numbers. The gradient of `lax.split` is
    laid out side by side; that of slices is a sum of padded parts."""
    return list(lax.split(array, channels, axis=array.ndim - 1)) if channels else [array]


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
    """The folded form of `ConvBatchNorm`: convolution, bias, activation.

    Args:
      folded: {kernel, bias}, which `packing` may have left uncut.
    """
    folded = packing.read(folded)
    y = _convolve(x, folded["kernel"], kind=kind, stride=stride, lowering=lowering)
    return _with_bias(y, folded, activation)


def _with_bias(y: jax.Array, folded: Folded, activation: Activation) -> jax.Array:
    return activate(y + folded["bias"].astype(y.dtype), activation)


def expand_depthwise(
    x: jax.Array,
    expand: Folded,
    depthwise: Folded,
    *,
    stride: int,
    lowering: convolution.Lowering,
) -> jax.Array:
    """`conv_bias` by a pointwise layer, then by a depthwise one, as a predictor runs them."""

    def expanded() -> jax.Array:  # Weights are cut inside, or each cut would be a kernel.
        return conv_bias(x, expand, kind="pointwise", lowering=lowering)

    depthwise = packing.read(depthwise)
    kernel = depthwise["kernel"].astype(x.dtype)
    y = convolution.depthwise_of(expanded, kernel, stride=stride, lowering=lowering)
    return _with_bias(y, depthwise, "relu")
