"""Networks for tests."""

import jax
import jax.numpy as jnp
import numpy as np


def as_if_trained(variables, *, seed: int = 0):
    """Fresh variables with batch norms that are not the identity, and in which no path is silent:
    residual paths start with a scale of zero, which would hide what they compute."""
    rng = np.random.default_rng(seed)

    def randomise(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        if name in ("bias", "mean"):
            return jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), jnp.float32)
        return leaf

    return jax.tree_util.tree_map_with_path(randomise, variables)
