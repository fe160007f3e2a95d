"""Learning-rate schedules and optimizers of the three stages."""

import dataclasses
from typing import Literal

import optax

ScheduleKind = Literal["constant", "step", "cosine", "one_cycle"]
SCHEDULE_KINDS: tuple[ScheduleKind, ...] = ("constant", "step", "cosine", "one_cycle")


@dataclasses.dataclass(frozen=True)
class SgdSettings:
    """Stochastic gradient descent with decoupled schedule.

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


def sgd(settings: SgdSettings, *, total_steps: int) -> optax.GradientTransformation:
    """SGD with Nesterov momentum (none if it is 0) over `total_steps` updates."""
    schedule = learning_rate_schedule(
        settings.schedule, learning_rate=settings.learning_rate, total_steps=total_steps
    )
    momentum = settings.momentum or None
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay),
        optax.sgd(schedule, momentum=momentum, nesterov=momentum is not None),
    )


def adam(
    learning_rate: float, *, decay_every_steps: int | None = None
) -> optax.GradientTransformation:
    """Adam; the rate falls to a tenth after every `decay_every_steps` updates."""
    if decay_every_steps is None:
        return optax.adam(learning_rate)
    return optax.adam(
        optax.exponential_decay(learning_rate, decay_every_steps, 0.1, staircase=True)
    )
