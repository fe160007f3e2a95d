"""InstaNAS on ImageNet, streamed from the disk.

python -m experiments.imagenet --flagfile=experiments/flagfiles/imagenet.flags
"""

from experiments import run
from experiments.config import Config, DataConfig, ModelConfig

# Images are cropped when they are decoded, so the only augmentation on the device is the flip.
DEFAULTS = Config(
    "imagenet2012",
    data=DataConfig(validation_size=10_000, crop_pad=0, cutout=0),
    model=ModelConfig(preset="px224"),
)

if __name__ == "__main__":
    run.main(DEFAULTS)
