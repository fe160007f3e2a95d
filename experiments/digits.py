"""InstaNAS on scikit-learn's bundled handwritten digits: no download, minutes on two cores.

python -m experiments.digits --flagfile=experiments/flagfiles/digits.flags
"""

from experiments import run
from experiments.config import Config, DataConfig
from instanas_jax import augment

DEFAULTS = Config("digits", data=DataConfig(validation_size=300))

if __name__ == "__main__":
    run.main(DEFAULTS, augment.DIGITS)
