"""One update of each stage: time, compilation, memory, share of the roofline, and PyTorch's.

python -m benchmarks.train_step --output=benchmarks/results/train_step.json

Every stage's programs are those of a run (`stage_programs`), on synthetic images. A step is a batch
from the host, `prepare` (augmentation, masks) and `update` (forward, gradient, optimizer), each
timed to its end, in turn with the peers' updates (A B A B):

  torch        the same network, weights, images and mask in PyTorch (`torch_supernet`), in the
               memory layout that is faster here, in bfloat16 by autocast where --dtype says so
  torch_alone  that in a process of its own, as a program of its user's would run: on CPUs freed
               memory stays with our process (`environment.configure_cpu`), and `torch` gains by it
  native       ours with plain grouped convolutions; on accelerators ours are that already
  remat        ours with --remat, for its time and its memory

A peer's first loss must be ours, or nothing is written. Stages with the same update are compared
once. Rows, after the stage's name:

  PROGRAM_compile_trace, _compile_xla      seconds; programs that stages share compile once; of
                                           native and remat, after their names, as memory is
  host_batch, prepare, update, step        seconds
  images_a_second                          through whole steps
  input_share                              of a step that host_batch and prepare take, one by one
  loop_step, input_wait_share              a step of the training loop, which waits for nothing, and
                                           the share of it in which no update runs
  update_roofline_share                    time at the ceiling over time of `update` (`roofline`)
  update_planned_memory                    XLA's plan for `update` on one device: arguments, results
                                           and temporaries
  peak_memory                              accelerators: the most in use so far in this process, by
                                           the device's own account
  update_PEER, update_PEER_over_ours       seconds of a peer's update; ratio to ours, turn by turn
  update_torch_LAYOUT_trial                the update by which PyTorch's layout was chosen; its
                                           _peak_memory on accelerators; likewise torch_alone

Activations have the type --dtype. Batch sizes are the same in all stages, not the recipe's.
"""

import os
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from benchmarks import reporting, roofline, stage_programs, step_rows
from experiments import flags as flags_lib
from experiments.config import ModelConfig
from instanas_jax import feeding
from instanas_jax.errors import InputError


def _define_flags() -> None:
    flags_lib.define_section(ModelConfig())
    flags_lib.define_output()
    flags.DEFINE_integer("num_classes", 100, "Classes of the classifier.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 64, "Images an update, over all devices.", lower_bound=1)
    flags.DEFINE_integer("repeats", 7, "Timed updates of ours and of PyTorch.", lower_bound=1)
    flags.DEFINE_integer("native_repeats", 1, "Timed updates of native.", lower_bound=1)
    flags.DEFINE_list(
        "stages",
        [kind for kind in stage_programs.KINDS if kind != "finetune"],
        f"Updates to measure, of {', '.join(stage_programs.KINDS)}; finetune, of a policy that "
        "settled nothing, updates as pretrain does.",
    )
    flags.DEFINE_list(
        "peers",
        ["torch"],
        f"Of {', '.join(step_rows.PEERS)}; empty: none. On CPUs native takes minutes.",
    )
    flags.DEFINE_integer(
        "ceiling_size",
        0,
        "Side of the matrices whose product is the ceiling of arithmetic; 0: by the device.",
        lower_bound=0,
    )


def _read_options() -> step_rows.Options:
    values: Any = flags.FLAGS
    for flag, choices in (("stages", stage_programs.KINDS), ("peers", step_rows.PEERS)):
        for name in getattr(values, flag):
            if name not in choices:
                raise InputError(f"--{flag} names '{name}': choose of {', '.join(choices)}")
    feeding.check_batch_size(values.batch_size, flag="batch_size")
    return step_rows.Options(
        model=flags_lib.read_section(ModelConfig),
        num_classes=values.num_classes,
        batch_size=values.batch_size,
        repeats=values.repeats,
        native_repeats=values.native_repeats,
        peers=tuple(values.peers),
        ceiling_size=values.ceiling_size or roofline.default_size(),
    )


def _run() -> None:
    # PyTorch lives in the same accelerator's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    output, bench = flags_lib.read_output(), step_rows.Bench(_read_options())
    rows = list(bench.ceiling_rows)
    for kind in tqdm(flags.FLAGS.stages, desc="stages", unit="stage"):
        rows += bench.measure(kind)
    reporting.write_report(output, benchmark="train_step", results=rows)
    reporting.print_rows(rows)


def main() -> None:
    # What comes out of a cache of programs was not compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    _define_flags()
    flags_lib.start(_run)


if __name__ == "__main__":
    main()
