"""InstaNAS in JAX: instance-aware neural architecture search that really skips."""

__version__ = "0.1.0"
