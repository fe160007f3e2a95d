"""Packed weights are the same weights, in fewer constants."""

import jax
import jax.numpy as jnp
import numpy as np

from instanas_jax import packing

RNG = np.random.default_rng(0)
WEIGHTS = {
    "bias": RNG.normal(size=(7,)).astype(np.float32),
    "small": [RNG.normal(size=(3, 5)).astype(np.float32) for _ in range(4)],
    "depthwise": RNG.normal(size=(5, 5, 2**9)).astype(np.float32),
    "large": RNG.normal(size=(2**7, 2**7)).astype(np.float32),
}


def test_what_is_read_is_what_was_embedded():
    read = jax.jit(lambda: packing.read(packing.embed(WEIGHTS)))()
    jax.tree.map(np.testing.assert_array_equal, read, WEIGHTS)


def test_all_small_arrays_are_one_constant():
    def total():
        weights = packing.read(packing.embed(WEIGHTS))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(weights))

    text = jax.jit(total).lower().compile().as_text()
    small = sum(leaf.size for leaf in jax.tree.leaves(WEIGHTS)) - WEIGHTS["large"].size
    assert f"f32[{small}]{{0}} constant" in text
    arrays = [line for line in text.splitlines() if " constant(" in line and "f32[]" not in line]
    assert len(arrays) == 2


def test_weights_without_small_arrays():
    large = {"large": WEIGHTS["large"]}
    read = jax.jit(lambda: packing.read(packing.embed(large)))()
    np.testing.assert_array_equal(read["large"], large["large"])
