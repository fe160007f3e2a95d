"""Batches arrive on four devices, from the host or from images that lie there, the same."""

import jax
import numpy as np
import pytest

from instanas_jax import data, data_sources, feeding, parallel
from instanas_jax.errors import InputError

IMAGES = data.split(
    data_sources.synthetic(train_size=40, test_size=4), validation_size=4
).train  # 36 images: two batches of 16 an epoch.
OPTIONS = {"batch_size": 16, "seed": 7, "start_step": 1, "num_steps": 3}


@pytest.mark.parametrize("resident", [False, True])
def test_devices_get_the_batches_of_the_host(resident):
    ours = list(feeding.train_batches(IMAGES, resident=resident, **OPTIONS))
    expected = list(data.train_batches(IMAGES, **OPTIONS))
    assert len(ours) == len(expected) == 3
    for one, other in zip(ours, expected, strict=True):
        assert one["image"].shape == (4, 4, 32, 32, 3)
        gathered = parallel.gather(one)
        for name, values in other.items():
            np.testing.assert_array_equal(gathered[name], values)
            assert gathered[name].dtype == np.asarray(values).dtype


@pytest.mark.parametrize("resident", [False, True])
def test_a_mistake_shows_at_the_call(resident):
    with pytest.raises(InputError, match="batch_size is 64"):
        feeding.train_batches(IMAGES, resident=resident, **{**OPTIONS, "batch_size": 64})


@pytest.mark.parametrize(
    ("memory", "expected"), [(None, False), (8 * IMAGES.images.nbytes, True), (1000, False)]
)
def test_images_stay_on_accelerators_with_room(monkeypatch, memory, expected):
    monkeypatch.setattr(parallel, "memory_bytes", lambda: memory)
    assert feeding.is_resident(IMAGES) == expected


@pytest.mark.parametrize(("backend", "waits"), [("cpu", True), ("gpu", False)])
def test_batches_are_waited_for_on_cpus_alone(monkeypatch, backend, waits):
    waited = []
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "block_until_ready", lambda batch: waited.append(batch) or batch)
    batches = list(feeding.train_batches(IMAGES, resident=False, **OPTIONS))
    assert len(batches) > 1
    assert waited == (batches if waits else [])
