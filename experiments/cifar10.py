"""InstaNAS on CIFAR-10.

python -m experiments.cifar10 --flagfile=experiments/flagfiles/cifar10.flags
"""

from experiments import run
from experiments.config import Config

DEFAULTS = Config("cifar10")

if __name__ == "__main__":
    run.main(DEFAULTS)
