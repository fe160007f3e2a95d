"""The machine: how XLA's CPU backend is set up here, and what a measurement ran on."""

import concurrent.futures
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import pathlib
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

import instanas_jax
from instanas_jax.errors import InputError

Result = TypeVar("Result")

_CPU_INFO = pathlib.Path("/proc/cpuinfo")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Options of glibc's mallopt, from <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
# Arenas a processor, 8 by default. They hold twice the memory of 2 in training at width 1 and take
# two seconds of every step from the system; with one for all, a narrow network's step took half as
# long again, its threads waiting for each other's allocations.
_ARENAS_TO_TRAIN = 2
# Where single images are answered, what compiling leaves in a shared arena is searched by every
# call, up to 100 us of it.
_ARENAS_TO_INFER = 8
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG, from <sys/prctl.h>.
# Threads of XLA's own pool; read when the backend starts.
_POOL_VARIABLE = "NPROC"
# The C library where it is glibc, whose options and functions of its own are used here.
_libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
_XLA_FLAGS = {
    "--xla_backend_extra_options": "xla_cpu_use_multi_output_fusion",
    "--xla_backend_optimization_level": "1",
    "--xla_cpu_prefer_vector_width": "512",
}
_INFERENCE_XLA_FLAGS = {"--xla_cpu_experimental_ynn_fusion_type": ""}


def configure_cpu(*, inference_threads: int | None = None) -> None:
    """Sets XLA's CPU backend up for networks of many small kernels; call it before any other JAX,
    or it changes nothing.

    Does nothing where an accelerator trains, whose compiler reads the same flags. Single images are
    answered and timed on the CPU there too: networks are trained for the processors that will run
    them.

    A call is dispatched on its own thread: waking another costs 20 to 40 us, which is much of
    a small network's time and as much as a small cell takes.
    LLVM at level 1 compiles the supernet's update a fifth faster into code that is as fast: the
    loops that matter are XLA's own. Loops of several outputs halve the rest: XLA would compute what
    several loops read in each of them. Vectors of 512 bits, where the processor has them, take 3
    to 6 % off. A flag that the user's XLA_FLAGS name stays.
    Freed memory stays with the process. XLA allocates the temporaries of a step anew, hundreds of
    megabytes; faulting fresh pages in took a third of a training step (width 0.75, batch 64:
    0.72 s, without 0.51 s).

    Args:
      inference_threads: given where the process answers or times single images, for which JAX then
        uses the CPU alone: threads of XLA's pool. One is best for narrow networks, whose kernels
        are done before another thread wakes (MobileNetV2 at width 0.75, stem stride 2, on two
        cores: 0.35 ms, on two threads 0.39 to 0.61); at width 1 two gain little. Matrix products
        are then Eigen's: YNNPACK, XLA's default and a fifth faster in training, takes some
        microseconds a call to begin, a fifth of MobileNetV2's time at width 1.
    """
    if inference_threads is not None:
        jax.config.update("jax_platforms", "cpu")
    if _accelerator_may_train():
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    arenas = _ARENAS_TO_TRAIN if inference_threads is None else _ARENAS_TO_INFER
    _keep_freed_memory(arenas=arenas * usable_processors())
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = dict(_XLA_FLAGS)
    if inference_threads is not None:
        wanted |= _INFERENCE_XLA_FLAGS
        os.environ[_POOL_VARIABLE] = str(inference_threads)
    for name, value in wanted.items():
        if name not in flags:
            flags = f"{flags} {name}={value}".strip()
    os.environ["XLA_FLAGS"] = flags


def keep_compiled(directory: str | os.PathLike[str]) -> None:
    """Keeps programs that took a second to compile in a folder, for this process's children and
    whoever runs the same later.

    Does nothing where the user's JAX_COMPILATION_CACHE_DIR names a folder. What is kept here fits
    this processor alone, so each kind has a folder of its own inside. The oldest go where all take
    more than 2 GiB.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    folder = os.path.join(directory, _processor_digest())
    for name, value in (("dir", folder), ("max_size", 2 * 2**30)):
        os.environ[f"JAX_COMPILATION_CACHE_{name.upper()}"] = str(value)
        jax.config.update(f"jax_compilation_cache_{name}", value)


def _processor_digest() -> str:
    """Differs where a processor has other instructions."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else [platform.processor()]
    telling = sorted(
        {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    )
    return hashlib.sha256("\n".join(telling or lines).encode()).hexdigest()[:16]


def in_inference_process(function: Callable[..., Result], *arguments: Any, threads: int) -> Result:
    """A function's result from a process that `configure_cpu` has set up for inference.

    For programs that train, on all threads or on an accelerator, and time single images as well.

    Args:
      function: of a module's top level.
      arguments: without arrays on a device; they travel by pickle, as the result does.
      threads: see `configure_cpu`.

    Raises:
      InputError: the process was ended from outside.
    """
    with concurrent.futures.ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=functools.partial(_begin_inference_process, threads),
    ) as executor:
        before = set(multiprocessing.active_children())
        # Ctrl-C in a terminal would reach both: the one that waits hears it, and ends the other.
        try:
            with _interrupts_wait():
                answer = executor.submit(function, *arguments)
            return answer.result()
        except KeyboardInterrupt:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            raise
        except concurrent.futures.BrokenExecutor:
            raise InputError(
                "the process that answers and times single images was ended, perhaps for want of "
                "memory: make room, and repeat the command"
            ) from None


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """SIGINT comes after the block; processes that begin inside never hear it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_inference_process(threads: int) -> None:
    end_with_parent()
    configure_cpu(inference_threads=threads)


def end_with_parent() -> None:
    """Has the system end this process when the one that started it ends, where it can (Linux).

    A process that is killed cannot end those it started, which would time on for nobody.
    """
    if _libc is not None and hasattr(_libc, "prctl"):
        _libc.prctl(_END_WITH_PARENT, signal.SIGKILL)


def _keep_freed_memory(*, arenas: int) -> None:
    if _libc is not None:
        _libc.mallopt(_MMAP_MAX, 0)
        _libc.mallopt(_TRIM_THRESHOLD, -1)  # Never trims.
        _libc.mallopt(_ARENA_MAX, arenas)


def release_memory() -> None:
    """Gives the system back what tracing and compiling left behind, once predictors are made.

    Jitted functions compile again when next called. Supernet at width 1: of 1,100 MB resident
    beyond those of JAX itself, 300 remain.
    """
    jax.clear_caches()
    gc.collect()
    if _libc is not None:
        _libc.malloc_trim(0)


def _accelerator_may_train() -> bool:
    """Known without starting a backend, which would read the flags."""
    return getattr(jax.config, "jax_platforms", None) != "cpu" and _has_accelerator_plugin()


def _has_accelerator_plugin() -> bool:
    return any(importlib.util.find_spec(module) for module in ("jax_plugins", "libtpu"))


def run_together(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """Results of all calls, on as many threads as there are processors: for calls that compile."""
    with concurrent.futures.ThreadPoolExecutor(usable_processors()) as threads:
        return [finished.result() for finished in [threads.submit(call) for call in calls]]


def describe_device(*, inference_threads: int | None = None) -> dict[str, Any]:
    """The computer and the backend on which JAX computes by default.

    Args:
      inference_threads: as an inference process of so many threads would describe it.

    Returns:
      `cpu`, the processor's model name; `cores`, logical processors of the machine; `threads`,
      those on which XLA runs a program on the CPU; `backend`, JAX's name of the platform;
      `accelerator`, the device's kind, or None on the CPU.
    """
    backend = "cpu" if inference_threads is not None else jax.default_backend()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "threads": inference_threads or _pool_threads(),
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


def _pool_threads() -> int:
    named = os.environ.get(_POOL_VARIABLE, "")
    return int(named) if named.isdigit() else usable_processors()


def usable_processors() -> int:
    """Processors on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
