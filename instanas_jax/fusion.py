"""Where XLA's fusion stops: a value that is made once, however many loops read it."""

import jax
from jax.experimental import xla_metadata


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
