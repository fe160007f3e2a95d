"""Measures a latency table of this computer's processor.

python -m experiments.profile --output=latency_table.json
"""

from absl import flags

from experiments import flags as flags_lib
from experiments import timing
from experiments.config import SPEC_SETTINGS, ModelConfig, RunConfig
from instanas_jax import environment, latency, latency_file


def _measure() -> None:
    model, run = flags_lib.read_section(ModelConfig), flags_lib.read_section(RunConfig)
    output = flags_lib.read_output()
    spec = model.spec(num_classes=flags.FLAGS.num_classes)
    environment.configure_cpu(inference_threads=run.inference_threads)
    table = timing.profile(spec, run.profile_rounds)
    latency_file.save(table, output)
    bounds = latency.baselines(table, spec)
    print(
        f"cells: MobileNetV2 {bounds.mobilenetv2_ms:.3f} ms, every path {bounds.max_ms:.3f} ms, "
        f"fewest {bounds.min_ms:.3f} ms"
    )
    fixed = ", ".join(f"{part} {time:.3f} ms" for part, time in table.fixed_ms.items())
    print(f"fixed: {fixed}")
    print(f"written to {output}")


def main() -> None:
    flags_lib.define_section(ModelConfig(), names=SPEC_SETTINGS)
    flags_lib.define_section(RunConfig(), names=("profile_rounds", "inference_threads"))
    flags.DEFINE_integer("num_classes", 100, "Classes of the classifier.")
    flags_lib.define_output()
    flags_lib.start(_measure)


if __name__ == "__main__":
    main()
