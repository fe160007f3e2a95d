"""The same update of the supernet by others: PyTorch, and ours in another setting."""

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from benchmarks import peers, reporting
from benchmarks.stage_programs import Runner, Subject
from instanas_jax import parallel, train_state
from instanas_jax.errors import InputError
from instanas_jax.search_space import SupernetSpec

if TYPE_CHECKING:
    from benchmarks import torch_supernet

Row = dict[str, Any]

# In our process, whose memory `environment.configure_cpu` keeps, and in one of its own.
TORCH = ("torch", "torch_alone")

# Relative difference of first losses, whose arithmetic differs in nothing but its order.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def torch_update(
    spec: SupernetSpec,
    state: train_state.TrainState,
    subject: Subject,
    runner: Runner,
    *,
    dtype: str,
    processes: contextlib.ExitStack | None = None,
) -> "torch_supernet.Fastest":
    """PyTorch's update of the same weights on the runner's inputs.

    Args:
      state: on the host, as trees.
      processes: takes up a process in which it runs alone; None: it runs in this one.

    Raises:
      peers.Missing: PyTorch is not there, or not for this accelerator.
    """
    from benchmarks import torch_alone, torch_supernet

    backend = jax.default_backend()
    is_cuda = backend == "gpu" and torch_supernet.has_cuda()
    if backend != "cpu" and not is_cuda:
        raise peers.Missing(f"torch is installed without support of this accelerator ({backend})")
    inputs = runner.inputs
    batch = parallel.gather({name: inputs[name] for name in ("image", "label", "mask")})
    rates = parallel.unreplicate(
        {name: inputs[name] for name in ("learning_rate", "momentum", "weight_decay")}
    )
    fastest_step = torch_supernet.fastest_step
    if processes is not None:
        process = processes.enter_context(torch_alone.own_process())
        fastest_step = functools.partial(torch_alone.fastest_step, process)
    return fastest_step(
        spec,
        state.supernet["params"],
        torch_supernet.Inputs(
            images=batch["image"],
            labels=batch["label"],
            mask=batch["mask"],
            **{name: float(rate) for name, rate in rates.items()},
        ),
        device="cuda" if is_cuda else "cpu",
        bf16=dtype == "bfloat16",
        paths=subject.paths,
    )


def trial_rows(name: str, trials: "dict[str, torch_supernet.Trial]") -> list[Row]:
    """What PyTorch's layouts took when the faster was chosen."""
    rows = []
    for layout, trial in trials.items():
        rows.append(reporting.measurement(f"{name}_{layout}_trial", [trial.seconds], "seconds"))
        if trial.peak_bytes is not None:
            megabytes = trial.peak_bytes / 1e6
            row = reporting.measurement(f"{name}_{layout}_peak_memory", [megabytes], "MB")
            rows.append({**row, "source": "torch.cuda.max_memory_allocated"})
    return rows


def rows(name: str, seconds: dict[str, list[float]], peer_names: list[str]) -> list[Row]:
    """Times of the peers' updates, and their ratios to ours, turn by turn.

    Args:
      seconds: of each call; ours is `update`, and a peer may have had fewer turns.
    """
    found = []
    for peer in peer_names:
        ratios = np.array(seconds[peer]) / np.array(seconds["update"][: len(seconds[peer])])
        found.append(reporting.measurement(f"{name}_{peer}", seconds[peer], "seconds"))
        found.append(reporting.measurement(f"{name}_{peer}_over_ours", ratios.tolist(), "ratio"))
    return found


def check_losses(kind: str, losses: dict[str, float], *, dtype: str) -> None:
    """InputError unless every first loss is that of `ours`."""
    ours = losses["ours"]
    for name, loss in losses.items():
        if not abs(loss - ours) < _TOLERANCE[dtype] * abs(ours):
            raise InputError(
                f"{kind}: the first loss of {name} is {loss:.6g}, ours {ours:.6g}: they do not "
                "compute the same, so their times mean nothing"
            )


def first_loss(runner: Runner) -> float:
    return float(parallel.unreplicate(runner.update()["loss"]))
