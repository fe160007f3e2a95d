"""Images that are read as they are needed: batches, crops, processes, and what goes wrong."""

import dataclasses
import io
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instanas_jax import data, decoding, image_sets
from instanas_jax.errors import InputError
from tests import fake_imagenet

ROOT = pathlib.Path(__file__).parent.parent
TRAIN, TEST, SIZE = 30, 11, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("prepared")
    fake_imagenet.write(path, train=TRAIN, validation=TEST)
    return path


def load(folder: pathlib.Path, **options) -> data.Dataset:
    options = {"validation_size": 6, "image_size": SIZE, **options}
    return data.load("imagenet2012", data_dir=str(folder), **options)


@pytest.fixture(scope="module")
def dataset(folder) -> data.Dataset:
    return load(folder)


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        for name in ("image", "label"):
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


class TestSplits:
    def test_are_cut_as_in_memory(self, dataset):
        def stub(split: str, indices: np.ndarray) -> data.ImageSet:
            assert split in ("train", "test")
            return data.ImageSet(np.zeros((len(indices), 1, 1, 3), np.uint8), indices)

        source = data.Source("stub", ("a",), (0.0,) * 3, (1.0,) * 3, TRAIN, TEST, stub)
        in_memory = data.split(source, validation_size=6)
        for split in ("train", "validation", "test"):
            streamed = getattr(dataset, split)
            np.testing.assert_array_equal(streamed.indices, getattr(in_memory, split).labels)

    def test_the_test_split_is_tfds_validation(self, dataset):
        assert len(dataset.test) == TEST and "validation" in dataset.test.name
        assert len(dataset.train) + len(dataset.validation) == TRAIN

    def test_summary(self, dataset):
        assert dataset.num_classes == 1000 and dataset.image_size == SIZE
        assert dataset.class_names[0] == "n01440764"

    def test_absent_set_names_folder_archives_and_remedy(self, tmp_path):
        with pytest.raises(InputError) as caught:
            load(tmp_path)
        message = str(caught.value)
        assert "\n" not in message and str(tmp_path) in message
        for part in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "downloads/manual"):
            assert part in message
        assert "tfds build imagenet2012" in message and "--data_dir" in message


class TestTraining:
    def test_resuming_continues_the_same_batches(self, dataset):
        # 24 images in batches of 5: 4 an epoch, so step 6 is inside the second epoch.
        options = {"batch_size": 5, "seed": 3}
        whole = list(data.train_batches(dataset.train, num_steps=10, **options))
        resumed = data.train_batches(dataset.train, start_step=6, num_steps=4, **options)
        assert_same(resumed, whole[6:])

    def test_labels_are_those_of_the_epochs_order(self, dataset):
        batches = list(data.train_batches(dataset.train, batch_size=5, seed=3, num_steps=8))
        for epoch in range(2):
            order = data.epoch_order(24, seed=3, epoch=epoch)[:20]
            seen = np.concatenate([b["label"] for b in batches[4 * epoch : 4 * epoch + 4]])
            np.testing.assert_array_equal(seen, dataset.train.indices[order])

    def test_crops_differ_by_place_and_seed(self, dataset):
        one_image = dataclasses.replace(dataset.train, indices=dataset.train.indices[:1])
        crops = [
            batch["image"].tobytes()
            for seed in (0, 1)
            for batch in data.train_batches(one_image, batch_size=1, seed=seed, num_steps=3)
        ]
        assert len(set(crops)) == 6

    @pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 1, 6), (0, 2, 4, 6)])
    def test_shares_concatenate_to_the_batch(self, dataset, cuts):
        options = {"batch_size": 6, "seed": 1, "num_steps": 5}
        whole = data.train_batches(dataset.train, **options)
        shares = [
            list(data.train_batches(dataset.train, share=slice(*ends), **options))
            for ends in zip(cuts, cuts[1:], strict=False)
        ]
        assert_same(joined(shares), whole)


def joined(shares: list[list[data.Batch]]) -> list[dict[str, np.ndarray]]:
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]


class TestEvaluation:
    @pytest.mark.parametrize("size", [4, 11, 16])
    def test_every_image_once_in_order(self, dataset, size):
        batches = list(data.eval_batches(dataset.test, batch_size=size))
        assert all(batch["image"].shape == (size, SIZE, SIZE, 3) for batch in batches)
        labels = np.concatenate([batch["label"] for batch in batches])
        assert labels[:TEST].tolist() == list(range(TEST))
        images = np.concatenate([batch["image"] for batch in batches])
        assert images[:TEST].any(axis=(1, 2, 3)).all() and not images[TEST:].any()

    def test_shares_concatenate_even_where_one_is_all_padding(self, dataset):
        # 11 images in batches of 8: the second batch has 3 images, so the last share has none.
        shares = [
            list(data.eval_batches(dataset.test, batch_size=8, share=slice(first, first + 4)))
            for first in (0, 4)
        ]
        assert not shares[1][1]["image"].any()
        assert_same(joined(shares), data.eval_batches(dataset.test, batch_size=8))

    def test_take_is_what_evaluation_sees(self, dataset):
        batch = next(data.eval_batches(dataset.test, batch_size=TEST))
        taken = dataset.test.take(np.array([7, 2]))
        np.testing.assert_array_equal(taken.images, batch["image"][[7, 2]])
        np.testing.assert_array_equal(taken.labels, batch["label"][[7, 2]])

    def test_blank_batches_have_the_shapes_of_real_ones(self, dataset):
        options = {"batch_size": 6, "share": slice(2, 5)}
        blank = data.blank_batch(dataset.test, **options)
        real = next(data.eval_batches(dataset.test, **options))
        for name in ("image", "label"):
            assert blank[name].shape == real[name].shape
            assert blank[name].dtype == real[name].dtype
            assert not blank[name].any()


@pytest.fixture
def parsed_flags():
    """As a program leaves absl's flags, of which some are Grain's."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.mark.usefixtures("parsed_flags")
class TestProcesses:
    def test_change_no_batch_and_end_with_their_work(self, folder, dataset):
        before = set(multiprocessing.active_children())
        parallel = load(folder, workers=2)
        options = {"batch_size": 5, "seed": 3, "start_step": 2, "num_steps": 5}
        assert_same(
            data.train_batches(parallel.train, **options),
            data.train_batches(dataset.train, **options),
        )
        assert set(multiprocessing.active_children()) == before

    def test_end_when_the_generator_is_closed(self, folder):
        before = set(multiprocessing.active_children())
        batches = data.train_batches(
            load(folder, workers=1).train, batch_size=5, seed=0, num_steps=10**6
        )
        next(batches)
        assert set(multiprocessing.active_children()) > before
        batches.close()
        assert set(multiprocessing.active_children()) == before

    def test_say_which_record_is_broken(self, tmp_path):
        fake_imagenet.write(tmp_path, train=8, validation=2, broken=5)
        images = load(tmp_path, validation_size=0, workers=1).train
        with pytest.raises(InputError, match=BROKEN):
            list(data.train_batches(images, batch_size=8, seed=0, num_steps=2))

    @pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
    def test_leave_no_orphan_when_the_program_is_ended(self, folder, kind):
        """SIGINT reaches the workers too, as Ctrl-C in a terminal does."""
        program = subprocess.Popen(
            [sys.executable, "-m", "tests.test_streaming", str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert program.stdout is not None and program.stderr is not None
        workers = [int(pid) for pid in program.stdout.readline().split()]
        assert len(workers) == 1 and all(alive(pid) for pid in workers)
        if kind == signal.SIGINT:
            os.killpg(program.pid, kind)
        else:
            program.send_signal(kind)
        program.wait(timeout=20)
        deadline = time.monotonic() + 10
        while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(alive(pid) for pid in workers)
        if kind == signal.SIGINT:
            assert program.stderr.read() == "interrupted\n"


def alive(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


BROKEN = r"record 5 of imagenet2012, split train cannot be decoded \(.*\): "


class TestBrokenRecords:
    def test_are_named(self, tmp_path):
        fake_imagenet.write(tmp_path, train=8, validation=2, broken=5)
        images = load(tmp_path, validation_size=0).train
        with pytest.raises(InputError, match=BROKEN) as caught:
            list(data.train_batches(images, batch_size=8, seed=0, num_steps=1))
        assert "\n" not in str(caught.value)

    def test_a_label_without_a_name_is_told(self, monkeypatch, tmp_path):
        monkeypatch.setattr(fake_imagenet, "label", lambda number: 1000 if number == 5 else number)
        fake_imagenet.write(tmp_path, train=8, validation=2)
        images = load(tmp_path, validation_size=0).train
        without = BROKEN.replace(".*", "label 1000 of an image, but 1000 class names")
        with pytest.raises(InputError, match=without):
            list(data.train_batches(images, batch_size=8, seed=0, num_steps=1))


class TestDecoding:
    @pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
    def test_every_mode_becomes_rgb(self, mode):
        original = fake_imagenet.picture(3, mode="RGB")
        decoded = decoding.decode(fake_imagenet.encode(original.convert(mode)))
        assert decoded.mode == "RGB" and decoded.size == original.size
        expected = original.convert(mode).convert("RGB")
        difference = np.asarray(decoded).astype(int) - np.asarray(expected)
        assert np.abs(difference).mean() < 3

    def test_a_png_under_another_name_is_read(self):
        stream = io.BytesIO()
        fake_imagenet.picture(0, mode="RGB").save(stream, "PNG")
        assert decoding.decode(stream.getvalue()).size == (40, 40)

    @settings(deadline=None)
    @given(
        width=st.integers(1, 5000),
        height=st.integers(1, 5000),
        seed=st.integers(0, 2**32),
    )
    def test_boxes_lie_within_the_image(self, width, height, seed):
        random = decoding.random_box(width, height, image_sets.generator(seed))
        for left, top, right, bottom in (random, decoding.central_box(width, height)):
            assert 0 <= left < right <= width and 0 <= top < bottom <= height

    @given(seed=st.integers(0, 2**32))
    def test_random_boxes_have_the_area_and_aspect_of_inception(self, seed):
        left, top, right, bottom = decoding.random_box(500, 375, image_sets.generator(seed))
        width, height = right - left, bottom - top
        # Sides are rounded to whole pixels, of which the smallest box has about 106 x 142.
        assert 0.079 <= width * height / (500 * 375) <= 1.0
        assert 3 / 4 - 0.01 <= width / height <= 4 / 3 + 0.01

    def test_random_boxes_reach_every_part_of_the_image(self):
        boxes = np.array(
            [decoding.random_box(500, 375, image_sets.generator(seed)) for seed in range(500)]
        )
        assert boxes[:, :2].min(axis=0).tolist() == [0, 0]
        assert boxes[:, 2:].max(axis=0).tolist() == [500, 375]
        shares = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (500 * 375)
        # Shares are uniform in 8 to 100 % but for large ones that do not fit and are drawn again.
        assert 0.4 < shares.mean() < 0.54 and shares.max() > 0.9 and shares.min() < 0.1

    def test_where_no_box_fits_it_is_the_middle(self):
        # 10 times as wide as high: a box of aspect 4:3 has at most 13 % of the area, and of the
        # seeds tried one finds none in ten tries.
        boxes = {decoding.random_box(1000, 100, image_sets.generator(seed)) for seed in range(400)}
        # 100 high, so 133.3 wide, in the middle of 1000.
        assert any(
            np.allclose(box, (500 - 200 / 3, 0, 500 + 200 / 3, 100), atol=1e-6) for box in boxes
        )

    def test_evaluation_is_resize_to_256_and_crop_to_224(self):
        # 512 x 384: the shorter side scaled to 256 makes 341.33 x 256, of which 224 x 224 in the
        # middle is 336 x 336 of the original, from (88, 24).
        assert decoding.central_box(512, 384) == (88, 24, 424, 360)

    def test_a_scaled_box_is_cut_from_the_scaled_image(self):
        image = fake_imagenet.picture(3, mode="RGB").resize((30, 20))
        scaled = decoding.scale(image, (6, 4, 16, 14), 5)
        whole = image.resize((15, 10), Image.Resampling.BILINEAR)
        assert scaled.shape == (5, 5, 3) and scaled.dtype == np.uint8
        np.testing.assert_allclose(scaled, np.asarray(whole)[2:7, 3:8], atol=1)


def test_neither_grain_nor_tensorflow_is_imported_without_need(folder):
    program = (
        "import sys\n"
        "from instanas_jax import data\n"
        "d = data.load('digits', validation_size=200)\n"
        "next(data.train_batches(d.train, batch_size=2, seed=0, num_steps=1))\n"
        "assert 'grain' not in sys.modules and 'tensorflow_datasets' not in sys.modules\n"
        f"d = data.load('imagenet2012', data_dir={str(folder)!r}, validation_size=6)\n"
        "next(data.train_batches(d.train, batch_size=2, seed=0, num_steps=1))\n"
        "assert 'grain' in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def _train_until_interrupted(folder: str) -> None:
    """The program of `test_leave_no_orphan_when_the_program_is_ended`."""
    # Where tests run in a shell's background, SIGINT is ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    images = load(pathlib.Path(folder), workers=1).train
    try:
        for batch in data.train_batches(images, batch_size=5, seed=0, num_steps=10**6):
            if batch["label"] is not None and multiprocessing.active_children():
                print(*(child.pid for child in multiprocessing.active_children()), flush=True)
                time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    _train_until_interrupted(sys.argv[1])
