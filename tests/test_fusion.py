"""Values made once behind calls, and kernels that need each other."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_padding_is_behind_a_call():
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    for pad in (0, 1, 2):
        expected = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        np.testing.assert_array_equal(
            jax.jit(fusion.padded_once, static_argnums=1)(x, pad), expected
        )
    program = jax.jit(lambda x: fusion.padded_once(x * 2.0, 1) ** 2).lower(x).compile().as_text()
    assert program.count(" call(") == 1


def test_a_call_pads_what_it_makes_without_constants():
    x, factor = jax.random.normal(jax.random.key(0), (2, 3, 3, 4)), jnp.arange(4.0)

    def of(x: jax.Array, pad: int) -> jax.Array:
        return fusion.in_call(lambda: fusion.padded(jnp.maximum(x * factor, 0.0), pad))

    for pad in (0, 1, 2):
        expected = fusion.padded(jnp.maximum(x * factor, 0.0), pad)
        np.testing.assert_array_equal(jax.jit(of, static_argnums=1)(x, pad), expected)
    program = jax.jit(lambda x: of(x, 1) ** 2).lower(x).compile().as_text()
    assert program.count(" call(") == 1
    called = re.search(r" call\(.*to_apply=(%[^,\s]+)", program)
    assert called is not None
    body = program[program.index(f"\n{called[1]} ") :].split("\n}")[0]
    assert body.count(" fusion(") == 1 and " constant(" not in body


def test_after_is_the_same_value_and_needs_what_is_known():
    x, known = jnp.arange(1, 7, dtype=jnp.uint8).reshape(2, 3), jnp.ones((2, 2))
    np.testing.assert_array_equal(jax.jit(fusion.after)(x, known), x)
    np.testing.assert_array_equal(jax.jit(fusion.after)(x, known.at[0, 0].set(jnp.nan)), 0)
    with pytest.raises(TypeError, match="int32"):
        fusion.after(x, jnp.ones(3, jnp.int32))
