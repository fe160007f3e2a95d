"""Where XLA's fusion stops, and in which order its kernels run."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import xla_metadata


def after(x: jax.Array, known: jax.Array) -> jax.Array:
    """x, which is not read before `known` is there.

    XLA's CPU backend runs a program on the thread that called it if each of its kernels needs the
    one before. Else they wait in a queue that its pool takes part in: 0.1 us a kernel, and threads
    wake on other processors. So a controller that looks at an image beside the network costs a
    narrow network a tenth of its time, and a third where processors are idle.

    Args:
      known: NaN in its first value turns x to zeros, which XLA can't rule out.
    """
    return jnp.where(jnp.isnan(jnp.ravel(known)[0]), jnp.zeros_like(x), x)


@jax.jit
def _zero_first(x: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(x, jnp.zeros((1,) * x.ndim, x.dtype), (0,) * x.ndim)


def padded_once(x: jax.Array) -> jax.Array:
    """As `made_once`, of a map whose first value is zero, which is written anew in its place.

    So the call does something, and keeps its place among the kernels that need each other; see
    `after`. It has no gradient of its own.
    """
    with xla_metadata.set_xla_metadata(inlineable="false"):
        return _zero_first(x)


@jax.jit
def _itself(x: jax.Array) -> jax.Array:
    return x


@jax.custom_vjp
def made_once(x: jax.Array) -> jax.Array:
    """x, behind a call that XLA does not look into; its gradient likewise.

    XLA's CPU backend puts cheap loops into each loop that reads their result, and a loop may read
    it many times: padding would run once for each tap of a depthwise kernel, and a cell's output
    was computed from five maps for each of the five loops that read it. On accelerators, whose
    fusion is another, this is not wanted.

    `lax.optimization_barrier` does less: around a cell's output it changed no loop, and the pass
    that makes one loop of several outputs (`environment.configure_cpu`) joins across it.
    """
    with xla_metadata.set_xla_metadata(inlineable="false"):
        return _itself(x)


def _forward(x):
    return made_once(x), None


def _backward(_, gradient):
    return (made_once(gradient),)


made_once.defvjp(_forward, _backward)
