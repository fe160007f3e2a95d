"""`made_once`: the same value and gradient, behind calls."""

import jax
import jax.numpy as jnp
import numpy as np

from instanas_jax import fusion


def test_changes_neither_value_nor_gradients():
    x = jax.random.normal(jax.random.key(0), (3, 4))

    def of(x):
        return jnp.sum(jnp.sin(fusion.made_once(x * 2.0)))

    value, gradient = jax.jit(jax.value_and_grad(of))(x)
    second = jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(of)(x))))(x)
    np.testing.assert_allclose(value, np.sin(2.0 * x).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2.0 * np.cos(2.0 * x), rtol=1e-5)
    np.testing.assert_allclose(second, -4.0 * np.sin(2.0 * x), rtol=1e-5)


def test_is_a_call_of_its_own_in_both_directions():
    def of(x):
        return jnp.sum(fusion.made_once(x * 2.0) ** 2)

    program = jax.jit(jax.grad(of)).lower(jnp.ones((64, 64))).compile().as_text()
    assert program.count(" call(") == 2
