"""Splits, sources and batches of images."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instanas_jax import data, data_sources
from instanas_jax.errors import InputError


def numbered(count: int) -> data_sources.ImageSet:
    """Images of 1x2 pixels whose every value, and whose label, is their number."""
    numbers = np.arange(count)
    images = np.broadcast_to(numbers[:, None, None, None], (count, 1, 2, 3)).astype(np.uint8)
    return data_sources.ImageSet(images, numbers.astype(np.int32))


def numbered_source(train: int = 100, test: int = 20) -> data_sources.Source:
    return data_sources.in_memory("numbered", ("a",), numbered(train), numbered(test))


class TestSplit:
    def test_train_and_validation_partition_the_training_images(self):
        dataset = data.split(numbered_source(), validation_size=30)
        assert len(dataset.train) == 70 and len(dataset.validation) == 30
        both = np.concatenate([dataset.train.labels, dataset.validation.labels])
        np.testing.assert_array_equal(np.sort(both), np.arange(100))
        np.testing.assert_array_equal(dataset.test.labels, np.arange(20))

    def test_split_depends_on_the_seed_alone(self):
        first, again, other = (
            data.split(numbered_source(), validation_size=30, split_seed=seed).validation.labels
            for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert set(first) != set(other)

    def test_limits_nest_and_leave_the_validation_split_alone(self):
        full, large, small = (
            data.split(numbered_source(), validation_size=30, train_limit=limit, test_limit=limit)
            for limit in (None, 15, 5)
        )
        np.testing.assert_array_equal(small.validation.labels, full.validation.labels)
        assert len(small.train) == len(small.test) == 5
        assert set(small.train.labels) < set(large.train.labels) < set(full.train.labels)
        assert set(small.test.labels) < set(large.test.labels) < set(full.test.labels)

    def test_images_stay_with_their_labels(self):
        train = data.split(numbered_source(), validation_size=30, train_limit=9).train
        np.testing.assert_array_equal(train.images[:, 0, 1, 2], train.labels)

    @pytest.mark.parametrize("size", [-1, 100, 101])
    def test_impossible_validation_size_is_refused(self, size: int):
        with pytest.raises(InputError, match=rf"validation_size is {size}\b.*100 training images"):
            data.split(numbered_source(), validation_size=size)

    def test_empty_validation_split_is_allowed(self):
        dataset = data.split(numbered_source(), validation_size=0)
        assert len(dataset.train) == 100 and len(dataset.validation) == 0

    def test_impossible_limit_is_refused(self):
        with pytest.raises(InputError, match="train_limit is 0"):
            data.split(numbered_source(), validation_size=1, train_limit=0)


class TestBundledSources:
    def test_digits(self):
        dataset = data.load("digits", validation_size=200)
        assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1147, 200, 450)
        assert dataset.image_size == 32 and dataset.num_classes == 10
        assert dataset.train.images.dtype == np.uint8 and dataset.train.images.max() == 255
        # 1,797 digits with about 180 of each class: a stratified quarter holds about 45 of each.
        assert set(np.bincount(dataset.test.labels)) <= {43, 44, 45, 46}
        np.testing.assert_array_equal(dataset.test.images[..., 0], dataset.test.images[..., 2])

    def test_synthetic_is_learnable_by_nearest_class_mean(self):
        dataset = data.load("synthetic", validation_size=64)
        pixels = dataset.train.images.reshape(len(dataset.train), -1).astype(float)
        centres = np.stack(
            [pixels[dataset.train.labels == k].mean(axis=0) for k in range(dataset.num_classes)]
        )
        test = dataset.test.images.reshape(len(dataset.test), -1).astype(float)
        nearest = np.argmin(((test[:, None] - centres) ** 2).sum(axis=-1), axis=1)
        assert np.mean(nearest == dataset.test.labels) > 0.95

    def test_synthetic_is_deterministic_and_sized_as_asked(self):
        kwargs = {"train_size": 10, "test_size": 4, "image_size": 8, "num_classes": 3}
        first, again, other = (
            data_sources.synthetic(**kwargs, seed=seed).read("train", np.arange(10))
            for seed in (5, 5, 6)
        )
        assert first.images.shape == (10, 8, 8, 3) and set(first.labels) == {0, 1, 2}
        np.testing.assert_array_equal(first.images, again.images)
        assert (first.images != other.images).any()

    def test_mean_and_std_standardise_the_training_images(self):
        source = data_sources.synthetic(train_size=20)
        pixels = source.read("train", np.arange(20)).images / 255.0
        standard = (pixels - source.mean) / source.std
        np.testing.assert_allclose(standard.mean(axis=(0, 1, 2)), 0, atol=1e-6)
        np.testing.assert_allclose(standard.std(axis=(0, 1, 2)), 1, atol=1e-6)

    def test_unknown_name_is_refused_with_the_known_ones(self):
        with pytest.raises(
            InputError, match="'mnist'.*cifar10, cifar100, imagenet2012, digits, synthetic"
        ):
            data.load("mnist", validation_size=1)


class TestPreparedSets:
    def test_absent_set_names_folder_and_remedy(self, tmp_path: pathlib.Path, monkeypatch):
        for data_dir in (str(tmp_path), None):
            monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
            with pytest.raises(InputError) as caught:
                data.load("cifar100", data_dir=data_dir, validation_size=1)
            message = str(caught.value)
            assert str(tmp_path) in message and "tfds build cifar100" in message
            assert "--data_dir" in message and "\n" not in message
        assert not list(tmp_path.iterdir()), "nothing may be downloaded"

    @pytest.mark.parametrize("version", ["3.0.2", "1.2.3"])
    def test_damaged_description_is_an_input_error(self, tmp_path: pathlib.Path, version: str):
        folder = tmp_path / "cifar100" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text('{"name":')
        with pytest.raises(InputError, match="cannot be read") as caught:
            data.load("cifar100", data_dir=str(tmp_path), validation_size=1)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "error", [ModuleNotFoundError("No module named 'x'"), PermissionError(13, "denied")]
    )
    def test_sound_data_are_not_blamed(self, tmp_path, monkeypatch, error: Exception):
        import tensorflow_datasets

        def fail(*_, **__):
            raise error

        (tmp_path / "cifar100" / "3.0.2").mkdir(parents=True)
        (tmp_path / "cifar100" / "3.0.2" / "dataset_info.json").write_text("{}")
        monkeypatch.setattr(tensorflow_datasets, "data_source", fail)
        with pytest.raises(InputError, match="cannot be read .*requirements.txt") as caught:
            data.load("cifar100", data_dir=str(tmp_path), validation_size=1)
        assert "delete" not in str(caught.value)

    @pytest.fixture
    def prepared(self) -> pathlib.Path:
        folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
        if not any((folder / "cifar100").glob("*/dataset_info.json")):
            pytest.skip(f"TFDS_DATA_DIR ({folder}) does not hold cifar100")
        return folder

    @pytest.fixture
    def links(self, prepared, tmp_path: pathlib.Path) -> pathlib.Path:
        """Links to the files of cifar100, to be replaced one by one, in `tmp_path`."""
        (version,) = (prepared / "cifar100").glob("*/")
        folder = tmp_path / "cifar100" / version.name
        folder.mkdir(parents=True)
        for file in version.iterdir():
            (folder / file.name).symlink_to(file)
        return folder

    def test_truncated_shard_is_an_input_error(self, links, tmp_path: pathlib.Path):
        shard = min(links.glob("*-test.*"))
        content = shard.read_bytes()
        shard.unlink()
        shard.write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match="cannot be read"):
            data_sources.open_source("cifar100", str(tmp_path)).read("test", np.arange(10))

    def test_label_without_a_name_is_an_input_error(self, links, tmp_path: pathlib.Path):
        names = links / "label.labels.txt"
        few = names.read_text().splitlines()[:3]
        names.unlink()
        names.write_text("\n".join(few) + "\n")
        source = data_sources.open_source("cifar100", str(tmp_path))
        with pytest.raises(InputError, match=r"label \d+ of an image, but 3 class names"):
            source.read("test", np.arange(100))

    def test_cifar100_equals_what_tfds_decodes(self, prepared):
        import tensorflow_datasets as tfds

        indices = np.array([9999, 0, 4321])
        source = data_sources.open_source("cifar100", str(prepared))
        read = source.read("test", indices)
        reference = tfds.data_source(
            "cifar100", split="test", data_dir=str(prepared), download=False
        )
        for position, index in enumerate(indices):
            np.testing.assert_array_equal(read.images[position], reference[index]["image"])
            assert read.labels[position] == reference[index]["label"]
        assert (source.train_size, source.test_size) == (50_000, 10_000)
        assert len(source.class_names) == 100 and source.class_names[0] == "apple"

    def test_cifar100_test_split_is_balanced_and_tensorflow_stays_out(self, prepared):
        program = (
            "import sys, numpy as np\n"
            "from instanas_jax import data\n"
            "d = data.load('cifar100', validation_size=10, train_limit=10)\n"
            "assert (np.bincount(d.test.labels) == 100).all()\n"
            "assert d.test.images.shape == (10_000, 32, 32, 3)\n"
            "assert 'tensorflow' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True)


class TestBatches:
    @given(seed=st.integers(0, 2**32), epoch=st.integers(0, 1000), count=st.integers(1, 50))
    def test_epoch_order_is_a_permutation_repeated_on_demand(self, seed, epoch, count):
        order = data.epoch_order(count, seed=seed, epoch=epoch)
        np.testing.assert_array_equal(np.sort(order), np.arange(count))
        np.testing.assert_array_equal(order, data.epoch_order(count, seed=seed, epoch=epoch))

    def test_epoch_order_changes_with_seed_and_epoch(self):
        orders = [
            tuple(data.epoch_order(100, seed=seed, epoch=epoch))
            for seed in (0, 1)
            for epoch in (0, 1)
        ]
        assert len(set(orders)) == 4

    @settings(deadline=None)
    @given(
        count=st.integers(1, 23),
        size_fraction=st.floats(0, 1),
        start=st.integers(0, 30),
        num_steps=st.integers(0, 12),
    )
    def test_resuming_anywhere_continues_the_same_batches(
        self, count, size_fraction, start, num_steps
    ):
        images, size = numbered(count), max(1, int(count * size_fraction))
        whole = list(
            data.train_batches(images, batch_size=size, seed=3, num_steps=start + num_steps)
        )
        resumed = data.train_batches(
            images, batch_size=size, seed=3, start_step=start, num_steps=num_steps
        )
        for expected, batch in zip(whole[start:], resumed, strict=True):
            np.testing.assert_array_equal(batch["label"], expected["label"])
            np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])

    def test_an_epoch_visits_no_image_twice_and_drops_the_partial_batch(self):
        # 10 images in batches of 4: two batches an epoch, two images left out.
        batches = list(data.train_batches(numbered(10), batch_size=4, seed=0, num_steps=4))
        assert data.steps_per_epoch(10, 4) == 2
        for epoch in range(2):
            first, second = batches[2 * epoch : 2 * epoch + 2]
            seen = np.concatenate([first["label"], second["label"]])
            np.testing.assert_array_equal(seen, data.epoch_order(10, seed=0, epoch=epoch)[:8])
            assert len(set(seen)) == 8

    @pytest.mark.parametrize("size", [0, 11])
    def test_impossible_batch_size_is_refused_at_the_call(self, size: int):
        with pytest.raises(InputError, match=f"batch_size is {size}, but there are 10 images"):
            data.train_batches(numbered(10), batch_size=size, seed=0, num_steps=1)

    @given(count=st.integers(0, 20), size=st.integers(1, 25))
    def test_evaluation_counts_every_image_once(self, count: int, size: int):
        batches = list(data.eval_batches(numbered(count), batch_size=size))
        assert all(len(batch["label"]) == size for batch in batches)
        seen = [label for batch in batches for label in batch["label"].tolist()]
        assert seen == list(range(count)) + [0] * (len(seen) - count)

    @given(count=st.integers(1, 20), size=st.integers(1, 12), processes=st.integers(1, 4))
    def test_shares_concatenate_to_the_whole_batch(self, count, size, processes):
        cuts = np.linspace(0, size, processes + 1).astype(int)
        shares = [slice(*ends) for ends in zip(cuts, cuts[1:], strict=False)]
        images = numbered(count)

        def check(draw):
            parts = [list(draw(share)) for share in shares]
            for whole, *pieces in zip(draw(slice(None)), *parts, strict=True):
                for name in ("image", "label"):
                    joined = np.concatenate([piece[name] for piece in pieces])
                    np.testing.assert_array_equal(joined, whole[name])

        check(lambda share: data.eval_batches(images, batch_size=size, share=share))
        if size <= count:
            check(
                lambda share: data.train_batches(
                    images, batch_size=size, seed=0, num_steps=5, share=share
                )
            )

    def test_a_blank_batch_is_padding_in_a_real_batchs_shape(self):
        images = data_sources.synthetic(image_size=8).read("train", np.arange(3))
        blank = data.blank_batch(images, batch_size=4, share=slice(1, 3))
        real = next(data.eval_batches(images, batch_size=4, share=slice(1, 3)))
        for name in ("image", "label"):
            assert blank[name].shape == real[name].shape and blank[name].dtype == real[name].dtype
            assert real[name].any() and not blank[name].any()

    def test_padding_is_zero(self):
        # 3 images in batches of 2: the second batch is image 2 and one of padding.
        last = list(data.eval_batches(numbered(3), batch_size=2))[-1]
        assert last["label"].tolist() == [2, 0]
        assert last["image"][:, 0, 0, 0].tolist() == [2, 0]
        assert last["image"].dtype == np.uint8 and last["label"].dtype == np.int32
