"""The machine: how XLA's CPU backend is set up here, and what a measurement ran on."""

import concurrent.futures
import ctypes
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax

import instanas_jax

_CPU_INFO = pathlib.Path("/proc/cpuinfo")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Options of glibc's mallopt, from <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_OPTIMIZATION_LEVEL = "--xla_backend_optimization_level"


def configure_cpu() -> None:
    """Sets XLA's CPU backend up for networks of many small kernels; call it before any other JAX.

    Does nothing where JAX has an accelerator's plugin, whose compiler reads the same flags.

    A program runs on the thread that calls it: waking another costs 20 to 40 us, which is much of
    a small network's time and as much as a small cell takes.
    LLVM at level 1 compiles the supernet's update a fifth faster into code that is as fast: the
    loops that matter are XLA's own. A level that the user's XLA_FLAGS name stays.
    Freed memory stays with the process. XLA allocates the temporaries of a step anew, hundreds of
    megabytes; faulting fresh pages in took a third of a training step (width 0.75, batch 64:
    0.72 s, without 0.51 s).
    """
    if _has_accelerator_plugin():
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    _keep_freed_memory()
    flags = os.environ.get("XLA_FLAGS", "")
    if _OPTIMIZATION_LEVEL not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_OPTIMIZATION_LEVEL}=1".strip()


def _keep_freed_memory() -> None:
    """Nothing happens where the C library is not glibc."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)  # Never trims.


def _has_accelerator_plugin() -> bool:
    """Known without starting a backend, which would read the flags."""
    return any(importlib.util.find_spec(module) for module in ("jax_plugins", "libtpu"))


def run_together(calls: Sequence[Callable[[], object]]) -> None:
    """Makes all calls, on as many threads as there are processors: for first calls, which
    compile."""
    with concurrent.futures.ThreadPoolExecutor(_usable_processors()) as threads:
        for finished in [threads.submit(call) for call in calls]:
            finished.result()


def describe_device() -> dict[str, Any]:
    """The computer and the backend on which JAX computes by default.

    Returns:
      `cpu`, the processor's model name; `cores`, logical processors of the machine; `threads`,
      those that this process may run on, which bounds XLA's pool on the CPU; `backend`, JAX's
      name of the platform; `accelerator`, the device's kind, or None on the CPU.
    """
    backend = jax.default_backend()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "threads": _usable_processors(),
        "backend": backend,
        "accelerator": None if backend == "cpu" else jax.devices()[0].device_kind,
    }


def describe_versions() -> dict[str, str]:
    """Versions of Python, of the packages that compute, and of this one."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return versions | {"instanas_jax": instanas_jax.__version__}


def _cpu_model() -> str:
    """The model name that Linux reports, or the best that `platform` knows elsewhere."""
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
