"""What is recorded about the machine, and how XLA is set up on it."""

import os
import platform
import signal
import subprocess
import sys

import jax
import pytest

from instanas_jax import environment
from instanas_jax.errors import InputError


@pytest.fixture
def restored(monkeypatch):
    """Settings of the process as they were, after the test; JAX chooses its platform meanwhile."""
    before = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_platforms", None)
    yield monkeypatch
    jax.config.update("jax_platforms", before)
    jax.config.update("jax_cpu_enable_async_dispatch", True)


OURS = [
    "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion",
    "--xla_backend_optimization_level=1",
    "--xla_cpu_prefer_vector_width=512",
]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", OURS),
        ("--xla_a=1", ["--xla_a=1", *OURS]),
        (
            "--xla_backend_optimization_level=3",
            ["--xla_backend_optimization_level=3", OURS[0], OURS[2]],
        ),
    ],
)
def test_a_users_xla_flags_stay(restored, before, after):
    restored.setenv("XLA_FLAGS", before)
    environment.configure_cpu()
    assert not jax.config.read("jax_cpu_enable_async_dispatch")
    assert os.environ["XLA_FLAGS"].split() == after


def test_an_accelerators_compiler_keeps_its_flags(restored):
    restored.setenv("XLA_FLAGS", "")
    restored.setattr(environment, "_has_accelerator_plugin", lambda: True)
    environment.configure_cpu()
    assert os.environ["XLA_FLAGS"] == ""


def test_compiled_programs_are_kept_unless_the_user_names_a_folder(tmp_path):
    """In processes of their own: the settings would reach other tests."""
    program = (
        "import jax, os, sys; from instanas_jax import environment; "
        "environment.keep_compiled(sys.argv[1]); "
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0); "
        "print(jax.jit(lambda x: x + 1)(1.0), os.environ['JAX_COMPILATION_CACHE_DIR'])"
    )

    def run(**variables: str) -> str:
        others = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "ours")],
            env={**others, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()[-1]

    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs")) == str(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()
    folder = run()  # One for this processor, which children inherit.
    assert folder.startswith(str(tmp_path / "ours")) and len(os.listdir(folder)) >= 1
    assert run() == folder


def test_calls_run_together_and_an_error_comes_out():
    assert environment.run_together([lambda: 1, lambda: 2]) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        environment.run_together([lambda: 1 / 0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its ways")
def test_freed_memory_stays_with_the_process():
    """Measured in a process of its own, which touches, frees and touches again 64 MiB.

    Of bytes: numpy would ask for huge pages, of which a few faults are enough.
    """
    program = """
import resource
from instanas_jax import environment
environment.configure_cpu()
size = 2**20  # A name, or Python would make the bytes a constant.
b"x" * (64 * size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * (64 * size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert int(faults) < 2**26 // 4096 // 10


def test_an_inference_process_has_flags_of_its_own(restored):
    restored.setenv("XLA_FLAGS", "")
    restored.setenv("NPROC", "")
    environment.configure_cpu()
    assert "ynn" not in os.environ["XLA_FLAGS"]
    environment.configure_cpu(inference_threads=1)
    assert "--xla_cpu_experimental_ynn_fusion_type=" in os.environ["XLA_FLAGS"].split()


def test_an_inference_process_has_its_threads_and_gives_back_results_and_errors():
    here = environment.describe_device()
    there = environment.in_inference_process(environment.describe_device, threads=1)
    assert there == environment.describe_device(inference_threads=1) == {**here, "threads": 1}
    with pytest.raises(ZeroDivisionError):
        environment.in_inference_process(divmod, 1, 0, threads=1)
    with pytest.raises(InputError, match="was ended"):
        environment.in_inference_process(os._exit, 1, threads=1)


def test_an_inference_process_never_hears_an_interruption():
    """Also while it starts, where Python would print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    there = environment.in_inference_process(
        signal.pthread_sigmask, signal.SIG_BLOCK, [], threads=1
    )
    assert signal.SIGINT in there and signal.SIGINT not in before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_images_are_timed_on_the_cpu_where_an_accelerator_trains(restored):
    restored.setenv("XLA_FLAGS", "")
    restored.setenv("NPROC", "")
    restored.setattr(environment, "_has_accelerator_plugin", lambda: True)
    restored.setattr(jax, "default_backend", lambda: "gpu")
    device = environment.in_inference_process(environment.describe_device, threads=1)
    assert device["backend"] == "cpu" and device["accelerator"] is None
    assert device == environment.describe_device(inference_threads=1)
    environment.configure_cpu()
    assert os.environ["XLA_FLAGS"] == ""
    environment.configure_cpu(inference_threads=1)
    assert jax.config.jax_platforms == "cpu" and os.environ["XLA_FLAGS"]  # pyright: ignore


def test_the_device_is_named():
    device = environment.describe_device()
    assert device["backend"] == "cpu" and device["accelerator"] is None
    assert 1 <= device["threads"] <= device["cores"]
    assert device["cpu"]
