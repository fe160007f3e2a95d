"""Batch norm over the global batch, in training, with gradients written out.

Memory is what training waits for: a cell's hidden maps are 18 times its input. Differentiating
batch norm as it is defined reads and writes its maps a dozen times. Two forms do better:

  batch_norm            of a map that is there already: two sums and one loop in each direction
  product_batch_norm    of a matrix product of fewer channels: the product's moments follow from
                        those of its input, so that the map is written once, normalised, and its
                        gradient is read as it comes

Sums and moments are float32. Derivatives are in reverse mode, of any order; JAX raises a TypeError
for forward mode. No gradient flows through the moments that are returned.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from instanas_jax import convolution

Activation = Literal["none", "relu", "relu6"]
EPSILON = 1e-5


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    if activation == "relu":
        return jnp.maximum(x, 0.0)
    if activation == "relu6":
        return jnp.clip(x, 0.0, 6.0)
    return x


def _through_activation(gradient: jax.Array, x: jax.Array, activation: Activation) -> jax.Array:
    """Gradient with respect to x of `activate(x)`."""
    if activation == "none":
        return gradient
    passes = x > 0.0
    if activation == "relu6":
        passes &= x < 6.0
    return jnp.where(passes, gradient, 0.0)


def _over_devices(sums: Any, axis_name: str | None) -> Any:
    return sums if axis_name is None else lax.psum(sums, axis_name)


def _global_count(x: jax.Array, axis_name: str | None) -> int:
    """Positions of all images, on all devices."""
    return x.size // x.shape[-1] * (1 if axis_name is None else lax.axis_size(axis_name))


def _unbiased(count: int) -> float:
    return count / max(count - 1, 1)


def _together(rows: list[jax.Array]) -> list[jax.Array]:
    """Vectors [C] that one small loop makes, rather than one each. They lie in one vector, as they
    do in `packing.ravel`: where neighbours leave together, they leave as they are."""
    together = lax.optimization_barrier(jnp.concatenate(rows))
    return list(lax.split(together, [row.size for row in rows]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(
    y: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    activation: Activation,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch norm, and the activation after it.

    Args:
      y: [B, H, W, C].
      scale, bias: [C].
      axis_name: the device axis that shares the batch, if any.

    Returns:
      [B, H, W, C], and the batch's mean and unbiased variance, [C] float32.
    """
    return _batch_norm_forward(y, scale, bias, activation, axis_name)[0]


def _sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=(0, 1, 2))


def _batch_norm_forward(y, scale, bias, activation, axis_name):
    exact = y.astype(jnp.float32)
    sums, square_sums = _over_devices((_sums(exact), _sums(exact * exact)), axis_name)
    count = _global_count(y, axis_name)
    mean = sums / count
    var = jnp.maximum(square_sums / count - mean * mean, 0.0)
    inverse = lax.rsqrt(var + EPSILON)
    gain = scale * inverse
    rows = _together([mean, var * _unbiased(count), inverse, gain, bias - mean * gain])
    mean, unbiased, _, gain, shift = rows
    normalised = y * gain.astype(y.dtype) + shift.astype(y.dtype)
    return (activate(normalised, activation), mean, unbiased), (y, rows, count)


def _batch_norm_backward(activation, axis_name, residuals, gradients):
    y, rows, count = residuals
    mean, _, inverse, gain, shift = rows
    normalised = y * gain.astype(y.dtype) + shift.astype(y.dtype)
    gradient = _through_activation(gradients[0], normalised, activation).astype(jnp.float32)
    exact = y.astype(jnp.float32)
    # The sum over centred y, without a map of it: XLA's reductions on CPUs want one.
    of_bias, with_y = _sums(gradient), _sums(gradient * exact)
    of_scale = with_y - mean * of_bias
    # Each device's loss reaches every device's y through the moments.
    whole_bias, whole_scale = _over_devices((of_bias, of_scale), axis_name)
    slope = inverse * inverse * whole_scale / count
    slope, offset = _together([slope, whole_bias / count - slope * mean])
    y_gradient = gain * (gradient - offset - slope * exact)
    return y_gradient.astype(y.dtype), of_scale * inverse, of_bias


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def product_batch_norm(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    activation: Activation,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A pointwise convolution, batch norm and activation as one product.

    With x of mean m [I] and covariance S [I, I], column w of the kernel makes outputs of mean m w
    and variance w' S w. So batch norm is known before the product and goes into the kernel, and
    its gradient is one to m and S, which are small, and from there to x.

    Args:
      x: [B, H, W, I].
      kernel: [I, O]; pays where O is some times I.
      scale, bias: [O].
      axis_name: the device axis that shares the batch, if any.

    Returns:
      [B, H, W, O], and the batch's mean and unbiased variance, [O] float32.
    """
    return _product_forward(x, kernel, scale, bias, activation, axis_name)[0]


def _extra_inputs(channels: int, dtype: Any) -> int:
    """Inputs beside x: one that is 1 everywhere, whose weight is the shift, which so needs no loop
    of its own; and zeros up to what the matrix units of accelerators want in bfloat16."""
    return 1 + (-(channels + 1) % 8 if dtype == jnp.bfloat16 else 0)


def _with_ones(x: jax.Array) -> jax.Array:
    extra = _extra_inputs(x.shape[-1], x.dtype)
    ones = jnp.broadcast_to(jnp.eye(1, extra, dtype=x.dtype)[0], (*x.shape[:-1], extra))
    return jnp.concatenate([x, ones], axis=-1)


def _with_shift(kernel: jax.Array, shift: jax.Array, dtype: Any) -> jax.Array:
    """Weights [I + extra, O] of what `_with_ones` gives."""
    extra = _extra_inputs(len(kernel), dtype)
    return jnp.concatenate([kernel, jnp.pad(shift[None], ((0, extra - 1), (0, 0)))]).astype(dtype)


# Of moments, which accelerators would else round to 10 bits.
_exactly = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _product_forward(x, kernel, scale, bias, activation, axis_name):
    count = _global_count(x, axis_name)
    exact = x.astype(jnp.float32)
    x_mean = _over_devices(_sums(exact), axis_name) / count
    centred = (exact - x_mean).reshape(-1, x.shape[-1])
    covariance = _over_devices(_exactly(centred.T, centred), axis_name) / count
    towards = _exactly(covariance, kernel)  # [I, O]
    mean, var = _exactly(x_mean, kernel), jnp.maximum(jnp.sum(kernel * towards, axis=0), 0.0)
    inverse = lax.rsqrt(var + EPSILON)
    gain = scale * inverse
    rows = [mean, var * _unbiased(count), inverse, gain, bias - mean * gain]
    mean, unbiased, inverse, gain, shift = rows = _together(rows)
    weights = _with_shift(kernel * gain, shift, x.dtype)
    inputs = convolution.in_parts(_with_ones(x))
    normalised = convolution.parts_product(inputs, weights).reshape(*x.shape[:3], -1)
    moments = (x_mean, towards, rows, count)
    return (
        (activate(normalised, activation), mean, unbiased),
        (inputs, kernel, scale, weights, normalised, moments),
    )


def _product_backward(activation, axis_name, residuals, gradients):
    inputs, kernel, scale, weights, normalised, (x_mean, towards, rows, count) = residuals
    mean, _, inverse, gain, _ = rows
    gradient = convolution.in_parts(_through_activation(gradients[0], normalised, activation))
    of_weights = convolution.parts_kernel_gradient(inputs, gradient).astype(jnp.float32)
    channels = len(kernel)
    of_kernel, of_shift = of_weights[:channels], of_weights[channels]
    # weights = kernel * gain, shift = bias - mean * gain, gain = scale / sqrt(var + EPSILON).
    of_gain = jnp.sum(of_kernel * kernel, axis=0) - of_shift * mean
    of_mean = -of_shift * gain
    of_var = -0.5 * of_gain * scale * inverse**3
    kernel_gradient = of_kernel * gain + x_mean[:, None] * of_mean + 2.0 * towards * of_var
    # Each device's loss reaches every device's x through its moments.
    of_covariance = _exactly(kernel * of_var, kernel.T)  # [I, I]
    of_x_mean = _exactly(kernel, of_mean)
    of_x_mean, of_covariance = _over_devices((of_x_mean, of_covariance), axis_name)
    spread = 2.0 * of_covariance / count
    offset = of_x_mean / count - _exactly(x_mean, spread)
    by_moments = _with_shift(spread, offset, inputs.dtype)
    x_gradient = convolution.parts_product(gradient, weights[:channels].T)
    x_gradient += convolution.parts_product(inputs, by_moments)
    x_gradient = x_gradient.reshape(*normalised.shape[:3], -1)
    return x_gradient, kernel_gradient, of_gain * inverse, of_shift


product_batch_norm.defvjp(_product_forward, _product_backward)
