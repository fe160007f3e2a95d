"""What a predictor of one image holds of a process's memory."""

import os
from typing import Any

import jax

from benchmarks import reporting
from benchmarks.subjects import Subjects
from instanas_jax import environment
from instanas_jax.search_space import SupernetSpec


def _resident_megabytes() -> float:
    """Of this process, now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _bare_jax_megabytes() -> float:
    jax.block_until_ready(jax.numpy.zeros(1))
    return _resident_megabytes()


def _predictor_megabytes(spec: SupernetSpec) -> float:
    """With a one-image predictor that has answered, and nothing else."""
    subjects = Subjects.random(spec, 1)
    predict, image = subjects.predictor, subjects.images[0]
    del subjects
    environment.release_memory()
    jax.block_until_ready(predict(image))
    return _resident_megabytes()


def rows(spec: SupernetSpec) -> list[dict[str, Any]]:
    """Resident megabytes with a predictor, without, and their difference."""
    if not os.path.exists("/proc/self/statm"):
        print("memory is read from /proc, which this system lacks")
        return []
    bare = environment.in_inference_process(_bare_jax_megabytes, threads=1)
    loaded = environment.in_inference_process(_predictor_megabytes, spec, threads=1)
    return [
        reporting.measurement("bare_jax_resident", [bare], "MB"),
        reporting.measurement("one_image_predictor_resident", [loaded], "MB"),
        reporting.measurement("one_image_predictor_above_bare_jax", [loaded - bare], "MB"),
    ]
