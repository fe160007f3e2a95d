"""InstaNAS on CIFAR-100.

python -m experiments.cifar100 --flagfile=experiments/flagfiles/cifar100.flags
"""

from experiments import run
from experiments.config import Config

DEFAULTS = Config("cifar100")

if __name__ == "__main__":
    run.main(DEFAULTS)
