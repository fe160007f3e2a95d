"""Forward pass of the full supernet: this project's lowering against plain grouped convolutions.

python -m benchmarks.supernet_forward --output=benchmarks/results/supernet_forward.json

Both run the same folded weights under the same mask, in turn (A B A B), after compilation.
"""

import time

import jax
import numpy as np
from absl import flags

from benchmarks import reporting
from experiments import flags as flags_lib
from instanas_jax import search_space, supernet

LOWERINGS = ("shifted", "native")


def _define_flags() -> None:
    flags_lib.define_output()
    flags.DEFINE_integer("batch_size", 64, "Images a forward pass.", lower_bound=1)
    flags.DEFINE_float("width", 1.0, "Width multiplier of the px32 supernet.")
    flags.DEFINE_integer("repeats", 5, "Timed passes of each lowering.", lower_bound=1)


def _run() -> None:
    output = flags_lib.read_output()
    batch_size = flags.FLAGS.batch_size
    spec = search_space.preset("px32", num_classes=100, width=flags.FLAGS.width)
    folded = jax.jit(supernet.fold)(supernet.init(jax.random.key(0), spec))
    images = jax.random.normal(jax.random.key(1), (batch_size, 32, 32, 3))
    mask = np.ones((batch_size, *spec.mask_shape), np.float32)

    def compiled(lowering):
        @jax.jit
        def forward(folded, images, mask):
            return supernet.apply_eval(spec, folded, images, mask, lowering=lowering)

        return forward

    programs = {lowering: compiled(lowering) for lowering in LOWERINGS}
    for program in programs.values():
        jax.block_until_ready(program(folded, images, mask))
    seconds: dict[str, list[float]] = {lowering: [] for lowering in LOWERINGS}
    for _ in range(flags.FLAGS.repeats):
        for lowering, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(folded, images, mask))
            seconds[lowering].append(time.perf_counter() - start)

    name = f"supernet_forward_batch_{batch_size}"
    ratios = np.array(seconds["native"]) / np.array(seconds["shifted"])
    rows = [
        reporting.measurement(f"{name}_{lowering}", times, "seconds")
        for lowering, times in seconds.items()
    ]
    rows.append(reporting.measurement(f"{name}_native_over_shifted", list(ratios), "ratio"))
    reporting.write_report(output, benchmark="supernet_forward", results=rows)
    reporting.print_rows(rows)


def main() -> None:
    _define_flags()
    flags_lib.start(_run)


if __name__ == "__main__":
    main()
