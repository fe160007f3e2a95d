"""Learning-rate schedules and optimizers of the three stages.

Hyper-parameters may be traced: a program that takes them as inputs serves every stage.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
import optax

ScheduleKind = Literal["constant", "step", "cosine", "one_cycle"]
SCHEDULE_KINDS: tuple[ScheduleKind, ...] = ("constant", "step", "cosine", "one_cycle")
Number = jax.Array | float


@dataclasses.dataclass(frozen=True)
class SgdSettings:
    """Stochastic gradient descent with Nesterov momentum (0: plain).

    Weight decay is added to the gradient, of batch-norm parameters too, as in PyTorch.
    """

    learning_rate: float
    schedule: ScheduleKind = "constant"
    momentum: float = 0.9
    weight_decay: float = 0.0


def learning_rate_schedule(
    kind: ScheduleKind, *, learning_rate: float, total_steps: int
) -> optax.Schedule:
    """A function of the update count.

    `step` multiplies by 0.1 at 1/2 and 3/4 of the updates; `cosine` falls to zero; `one_cycle`
    rises to `learning_rate` over the first 30 % and then falls.
    """
    total_steps = max(total_steps, 1)
    if kind == "step":
        return optax.piecewise_constant_schedule(
            learning_rate, {total_steps // 2: 0.1, total_steps * 3 // 4: 0.1}
        )
    if kind == "cosine":
        return optax.cosine_decay_schedule(learning_rate, total_steps)
    if kind == "one_cycle":
        return optax.cosine_onecycle_schedule(max(total_steps, 4), learning_rate)
    return optax.constant_schedule(learning_rate)


def decay_schedule(learning_rate: float, *, decay_steps: int | None) -> optax.Schedule:
    """Falls to a tenth after every `decay_steps` updates; None: constant."""
    if decay_steps is None:
        return optax.constant_schedule(learning_rate)
    return optax.exponential_decay(learning_rate, decay_steps, 0.1, staircase=True)


def sgd(
    learning_rate: Number, momentum: Number, weight_decay: Number
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),  # pyright: ignore[reportArgumentType]
        optax.trace(momentum, nesterov=True),  # pyright: ignore[reportArgumentType]
        optax.scale(-learning_rate),  # pyright: ignore[reportArgumentType]
    )


def adam(learning_rate: Number) -> optax.GradientTransformation:
    """Adam without weight decay."""
    return optax.chain(
        optax.scale_by_adam(),
        optax.scale(-learning_rate),  # pyright: ignore[reportArgumentType]
    )


def init(supernet_params: Any, controller_params: Any) -> dict[str, Any]:
    """Fresh optimizer states of both networks, on the host.

    Optax starts them all at zero, by a program a shape, which would take seconds to compile.
    """
    states = {
        "supernet": jax.eval_shape(sgd(0.0, 0.0, 0.0).init, supernet_params),
        "controller": jax.eval_shape(adam(0.0).init, controller_params),
    }
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), states)
