"""InstaNAS on scikit-learn's bundled handwritten digits: no download, minutes on two cores.

python -m experiments.digits --flagfile=experiments/flagfiles/digits.flags
"""

from experiments import run
from experiments.config import Config, DataConfig

# A mirrored digit is another sign, and a cut one may be too.
DEFAULTS = Config("digits", data=DataConfig(validation_size=300, crop_pad=2, flip=False, cutout=0))

if __name__ == "__main__":
    run.main(DEFAULTS)
