"""Where XLA's fusion stops, and in which order its kernels run."""

from collections.abc import Callable

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

    Chains are all networks but those with the large residual controller.

    Args:
      known: of floating point. NaN in its first value turns x to zeros, which XLA can't rule out.
    """
    if not jnp.issubdtype(known.dtype, jnp.floating):
        raise TypeError(f"nothing waits for {known.dtype}, which is never NaN")
    return jnp.where(jnp.isnan(jnp.ravel(known)[0]), jnp.zeros_like(x), x)


@jax.jit
def _zero_first(x: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(x, jnp.zeros((1,) * x.ndim, x.dtype), (0,) * x.ndim)


def padded(x: jax.Array, pad: int) -> jax.Array:
    """Maps [B, H, W, C] with `pad` zeros around."""
    return jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))


def in_call(make: Callable[[], jax.Array]) -> jax.Array:
    """make(), in a call that XLA does not look into: made once, by loops of its own.

    For predictors, whose kernels and constants are counted. If `make` ends by padding, the loop
    before pads as well, so nothing need be written again as by `padded_once`. And a constant that
    one loop reads is part of its code, while of one that two loops of a computation read XLA's CPU
    client makes a buffer at each call, also on paths that do not run: the supernet at width 1 had
    486 of them, which took MobileNetV2's mask a thirtieth of its time.
    """

    def made() -> jax.Array:
        with xla_metadata.set_xla_metadata(inlineable=None):  # Of this call, not of those inside.
            return make()

    with xla_metadata.set_xla_metadata(inlineable="false"):
        return jax.jit(made)()


def padded_once(x: jax.Array, pad: int) -> jax.Array:
    """As `padded`, made once as by `made_once`.

    The call writes the first of these zeros again, in its place: a call that did nothing would be
    one more kernel that needs no other; see `after`. For functions that have a gradient of their
    own: this one's is that of the write.
    """
    if not pad:
        return x
    around = padded(x, pad)  # Not within the call, or it would be one of its own.
    with xla_metadata.set_xla_metadata(inlineable="false"):
        return _zero_first(around)


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
