"""Batch norm's gradients against those that JAX derives, on one device and over two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instanas_jax import batch_norm

SHAPE = (6, 3, 3, 4)  # Of x: 54 positions.
INPUTS = {
    "x": 5.0 + 3.0 * jax.random.normal(jax.random.key(0), SHAPE),
    "kernel": jax.random.normal(jax.random.key(1), (4, 12)),
    "scale": jax.random.uniform(jax.random.key(2), (12,), minval=1.0, maxval=4.0),
    "bias": jax.random.normal(jax.random.key(3), (12,)),
}
WEIGHTS = jax.random.normal(jax.random.key(4), (*SHAPE[:3], 12))


def plain(x, kernel, scale, bias, activation, axis_name):
    """What JAX differentiates by itself."""
    y = jnp.einsum("bhwi,io->bhwo", x, kernel)
    mean = jnp.mean(y, axis=(0, 1, 2))
    var = jnp.mean((y - mean) ** 2, axis=(0, 1, 2))
    normalised = (y - mean) / jnp.sqrt(var + batch_norm.EPSILON) * scale + bias
    unbiased = var * 54 / 53
    return batch_norm.activate(normalised, activation), mean, unbiased


def of_a_map(x, kernel, scale, bias, activation, axis_name):
    y = jnp.einsum("bhwi,io->bhwo", x, kernel)
    return batch_norm.batch_norm(y, scale, bias, activation, axis_name)


FORMS = {"map": of_a_map, "product": batch_norm.product_batch_norm}


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("form", FORMS)
class TestForms:
    def loss(self, function, activation, axis_name=None):
        def loss(x, kernel, scale, bias, weights):
            outputs = function(x, kernel, scale, bias, activation, axis_name)
            return jnp.sum(outputs[0] * weights)

        return loss

    def test_values_and_moments(self, form, activation):
        ours = FORMS[form](*INPUTS.values(), activation, None)
        for one, other in zip(ours, plain(*INPUTS.values(), activation, None), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)

    def test_gradients_are_those_of_differentiated_moments(self, form, activation):
        gradients = [
            jax.grad(self.loss(function, activation), argnums=(0, 1, 2, 3))(
                *INPUTS.values(), WEIGHTS
            )
            for function in (FORMS[form], plain)
        ]
        for one, other in zip(*gradients, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)

    def test_reaches_over_devices(self, form, activation):
        """Two shards: each loss pulls at the other's values too; of parameters, each has its own
        part of the sum."""
        split = functools.partial(jnp.reshape, shape=(2, 3, *SHAPE[1:]))
        x_gradient, *of_params = jax.vmap(
            jax.grad(self.loss(FORMS[form], activation, "devices"), argnums=(0, 1, 2, 3)),
            in_axes=(0, None, None, None, 0),
            axis_name="devices",
        )(
            split(INPUTS["x"]),
            *list(INPUTS.values())[1:],
            WEIGHTS.reshape(2, 3, *WEIGHTS.shape[1:]),
        )
        expected = jax.grad(self.loss(plain, activation), argnums=(0, 1, 2, 3))(
            *INPUTS.values(), WEIGHTS
        )
        np.testing.assert_allclose(x_gradient.reshape(SHAPE), expected[0], rtol=1e-3, atol=1e-3)
        for one, other in zip(of_params, expected[1:], strict=True):
            np.testing.assert_allclose(one.sum(0), other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_follow_and_forward_mode_is_refused(form):
    def slope(function, scale):
        def loss(scale):
            inputs = {**INPUTS, "scale": scale}
            return jnp.sum(function(*inputs.values(), "none", None)[0] ** 2 * WEIGHTS)

        return jnp.sum(jax.grad(loss)(scale) ** 2)

    second, expected = (
        jax.grad(functools.partial(slope, function))(INPUTS["scale"])
        for function in (FORMS[form], plain)
    )
    np.testing.assert_allclose(second, expected, rtol=1e-3)
    with pytest.raises(TypeError):
        jax.jvp(
            lambda scale: FORMS[form](*{**INPUTS, "scale": scale}.values(), "none", None),
            (INPUTS["scale"],),
            (INPUTS["scale"],),
        )


def test_bfloat16_products_are_of_whole_tiles_and_as_exact_as_it_is():
    x = INPUTS["x"].astype(jnp.bfloat16)
    rest = list(INPUTS.values())[1:]
    text = jax.jit(lambda *inputs: batch_norm.product_batch_norm(*inputs, "relu", None)).lower(
        x, *rest
    )
    assert "8x12xbf16" in text.as_text()  # Four inputs, the ones and three of zeros.
    ours = batch_norm.product_batch_norm(x, *rest, "relu", None)[0]
    exact = plain(x.astype(jnp.float32), *rest, "relu", None)[0]
    assert ours.dtype == jnp.bfloat16
    difference = jnp.linalg.norm(ours.astype(jnp.float32) - exact)
    assert 1e-5 < difference / jnp.linalg.norm(exact) < 0.02
