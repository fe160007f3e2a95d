"""What is recorded about the machine, and how XLA is set up on it."""

import os

import jax
import pytest

from instanas_jax import environment


@pytest.fixture
def restored(monkeypatch):
    """Settings of the process as they were, after the test."""
    yield monkeypatch
    jax.config.update("jax_cpu_enable_async_dispatch", True)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "--xla_backend_optimization_level=1"),
        ("--xla_a=1", "--xla_a=1 --xla_backend_optimization_level=1"),
        ("--xla_backend_optimization_level=3", "--xla_backend_optimization_level=3"),
    ],
)
def test_a_users_xla_flags_stay(restored, before, after):
    restored.setenv("XLA_FLAGS", before)
    environment.configure_cpu()
    assert not jax.config.read("jax_cpu_enable_async_dispatch")
    assert os.environ["XLA_FLAGS"] == after


def test_an_accelerators_compiler_keeps_its_flags(restored):
    restored.setenv("XLA_FLAGS", "")
    restored.setattr(environment, "_has_accelerator_plugin", lambda: True)
    environment.configure_cpu()
    assert os.environ["XLA_FLAGS"] == ""


def test_the_device_is_named():
    device = environment.describe_device()
    assert device["backend"] == "cpu" and device["accelerator"] is None
    assert 1 <= device["threads"] <= device["cores"]
    assert device["cpu"]
