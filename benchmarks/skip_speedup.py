"""What skipping saves, one image and a batch, beside what a user would run instead.

python -m benchmarks.skip_speedup --output=benchmarks/results/skip_speedup.json

Every execution answers the same images under the same masks, in turn (A B B A), once on one thread
and once on two. `skipping` holds the controller and decides anew for each image;
`static_controller` is the subnet compiled for its mask, then the controller; `static` the subnet
alone, and so are the peers. `exported` is ONNX Runtime too, on the file that `experiments.export`
writes: controller and skipping inside. `masked` computes every path. One image gains little by a
second thread here and much in ONNX Runtime, so `onnx_runtime_two_threads`, beside ours on one, sets
each at its best on two cores. One image is answered in several processes, which compile anew, each
in another order: where weights and programs happen to lie in memory is worth a tenth. A turn's
first calls are not timed: after another network a program takes up to 1.15 times as long for some
six images, the more of them the more weights and code it has, and what is deployed answers many in
a row. Batches are shared out among as many programs as there are threads. With --workdir a trained
variant answers validation images as well, under the masks of its controller, in turn with
`mobilenetv2_onnx_runtime`, MobileNetV2 of the run's width, which is what it has to be faster than.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import predictor_memory, reporting, turns
from benchmarks.subjects import DENSITIES, Call, Subjects
from benchmarks.turns import Times
from experiments import flags as flags_lib
from experiments import timing, trained_run
from experiments.config import SPEC_SETTINGS, DataConfig, ModelConfig
from instanas_jax import environment
from instanas_jax.errors import InputError
from instanas_jax.policy import Settled
from instanas_jax.search_space import SupernetSpec

# Single images need more calls to warm than batches, and can have more turns.
_WARMING_IMAGES, _WARMING_BATCHES = 8, 1
_TURNS_OF_IMAGES_A_ROUND = 3
_THREADS = (1, 2)
_Trained = tuple[str, str, str]  # Arguments of `Subjects.trained`; the first is empty for none.
_TRAINED_ARCHITECTURES = 3  # The most frequent of a trained controller.


def _define_flags() -> None:
    flags_lib.define_section(ModelConfig(), names=SPEC_SETTINGS)
    flags_lib.define_output()
    flags.DEFINE_string("workdir", "", "A trained run to measure as well.")
    flags.DEFINE_string("variant", "", "Of the run; empty: its most accurate.")
    flags_lib.define_section(DataConfig(), names=("data_dir",))
    flags.DEFINE_integer("num_classes", 100, "Classes of the classifier.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 256, "Images of the batch with one mask each.")
    flags.DEFINE_integer("peer_batch_size", 64, "Images of the batch that peers run as well.")
    flags.DEFINE_integer(
        "rounds", 5, "Turns of each batch; of single images a third of a process's.", lower_bound=1
    )


def _rows(case: str, times: Times) -> list[dict[str, Any]]:
    """Milliseconds of every execution, and each one's ratio to skipping, turn by turn."""
    rows = [reporting.measurement(f"{case}_{name}", values, "ms") for name, values in times.items()]
    skipping = turns.medians(times["skipping"])
    rows += [
        reporting.measurement(
            f"{case}_{name}_over_skipping", (turns.medians(values) / skipping).tolist(), "ratio"
        )
        for name, values in times.items()
        if name != "skipping"
    ]
    return rows


def _one_image(
    subjects: Subjects, image: np.ndarray, mask: np.ndarray, threads: int, first: int
) -> dict[str, Call]:
    """What answers one image [1, H, W, 3] under a mask [L, O], laid out one after another from the
    place `first` on."""
    makers: dict[str, Callable[[], Call]] = {
        "skipping": lambda: functools.partial(subjects.skipping(), image, mask),
        "static_controller": lambda: functools.partial(
            subjects.static_controller(mask), image, mask
        ),
        "static": lambda: functools.partial(subjects.static(mask), image[0]),
        "masked": lambda: functools.partial(subjects.masked, image, mask[None]),
    }
    calls: dict[str, Call] = {}
    for name in timing.rotated(makers, first):
        calls[name] = makers[name]()
        jax.block_until_ready(calls[name]())
    calls |= subjects.exported(mask, image, threads=threads)
    calls |= subjects.peers(mask, image, threads=threads)
    if threads == 1:
        on_two = subjects.peers(mask, image, threads=2, names=["onnx_runtime"])
        calls |= {f"{name}_two_threads": call for name, call in on_two.items()}
    return calls


def _mobilenetv2(subjects: Subjects, image: np.ndarray, threads: int) -> dict[str, Call]:
    """MobileNetV2 of a variant's width, which no one has trained here, in ONNX Runtime."""
    architecture = subjects.masks()["mobilenetv2"]
    peers = subjects.peers(architecture, image, threads=threads, names=["onnx_runtime"])
    return {f"mobilenetv2_{name}": call for name, call in peers.items()}


def _trained_images(masks: np.ndarray) -> dict[str, int]:
    """By name, an image of each of the most frequent architectures among masks [N, L, O]."""
    flattened = masks.reshape(len(masks), -1)
    _, firsts, counts = np.unique(flattened, axis=0, return_index=True, return_counts=True)
    most = firsts[np.argsort(-counts)][:_TRAINED_ARCHITECTURES]
    return {f"trained_{rank}": int(place) for rank, place in enumerate(most, start=1)}


def _time_one_image(
    spec: SupernetSpec, trained: _Trained, size: int, rounds: int, threads: int, process: int
) -> dict[str, Times]:
    """Times of every case, in an inference process of so many threads."""
    made_up = Subjects.random(spec, 1)
    cases = [(name, made_up, made_up.images, mask) for name, mask in made_up.masks().items()]
    if trained[0]:
        variant = Subjects.trained(*trained, count=size)
        masks = variant.decide(variant.images)
        cases += [
            (name, variant, variant.images[place : place + 1], masks[place])
            for name, place in _trained_images(masks).items()
        ]
    times = {}
    for name, subjects, image, mask in tqdm(cases, desc=f"one image, {threads} threads"):
        calls = _one_image(subjects, image, mask, threads, process)
        _check_answers(name, calls)
        if subjects is not made_up:
            calls |= _mobilenetv2(subjects, image, threads)
        times[f"one_image_{name}"] = turns.time_in_turn(
            calls, turns=_TURNS_OF_IMAGES_A_ROUND * rounds, warming=_WARMING_IMAGES
        )
    return times


def _batches(subjects: Subjects, peer_size: int, threads: int) -> dict[str, dict[str, Call]]:
    """What answers a batch with a mask an image, one with all masks equal, and one that peers run
    as well."""
    rng = np.random.default_rng(1)
    images, predictor = subjects.images, subjects.batch_predictor(threads=threads)
    shape = (len(images), *subjects.spec.mask_shape)
    different = (rng.uniform(size=shape) < DENSITIES["medium"]).astype(np.float32)
    mobilenetv2 = subjects.masks()["mobilenetv2"]
    equal = np.broadcast_to(mobilenetv2, shape)
    static = subjects.batch_predictor(Settled.architecture(mobilenetv2), threads=threads)
    few = slice(0, peer_size)

    def answer(masks: np.ndarray) -> np.ndarray:
        predictor.decide(images)
        return predictor.answer(images, masks)

    return {
        f"batch_{len(images)}_different_masks": {
            "skipping": functools.partial(answer, different),
            "masked": functools.partial(subjects.masked, images, different),
        },
        f"batch_{len(images)}_equal_masks": {
            "skipping": functools.partial(predictor.answer, images, equal),
            "skipping_controller": functools.partial(answer, equal),
            "static": functools.partial(static.answer, images, equal),
            "masked": functools.partial(subjects.masked, images, equal),
        },
        f"batch_{peer_size}_mobilenetv2": {
            "skipping": functools.partial(predictor.answer, images[few], equal[few]),
            "static": functools.partial(static.answer, images[few], equal[few]),
            **subjects.peers(mobilenetv2, images[few], threads=threads),
        },
    }


def _trained_batch(subjects: Subjects, threads: int) -> dict[str, dict[str, Call]]:
    """What answers a batch under all decisions of a trained controller."""
    predictor, images = subjects.batch_predictor(threads=threads), subjects.images
    masks = predictor.decide(images)
    return {
        f"batch_{len(images)}_trained": {
            "skipping": functools.partial(predictor, images),
            "masked": functools.partial(subjects.masked, images, masks),
        }
    }


def _time_batches(
    spec: SupernetSpec,
    trained: _Trained,
    sizes: tuple[int, int],
    rounds: int,
    threads: int,
) -> dict[str, Times]:
    """Times of every batch, in an inference process of so many threads."""
    size, peer_size = sizes
    cases = _batches(Subjects.random(spec, size), peer_size, threads)
    if trained[0]:
        cases |= _trained_batch(Subjects.trained(*trained, count=size), threads)
    times = {}
    for name, calls in tqdm(cases.items(), desc=f"batches, {threads} threads"):
        _check_answers(name, calls)
        times[name] = turns.time_in_turn(calls, turns=rounds, warming=_WARMING_BATCHES)
    return times


def _measure(
    spec: SupernetSpec, trained: _Trained, sizes: tuple[int, int], rounds: int, threads: int
) -> list[dict[str, Any]]:
    """All rows of one number of threads."""
    times: dict[str, Times] = {}
    for process in range(timing.PROCESSES):
        of_process = environment.in_inference_process(
            _time_one_image, spec, trained, sizes[0], rounds, threads, process, threads=threads
        )
        for case, of_case in of_process.items():
            for name, values in of_case.items():
                times.setdefault(case, {}).setdefault(name, []).extend(values)
    times |= environment.in_inference_process(
        _time_batches, spec, trained, sizes, rounds, threads, threads=threads
    )
    rows = [row for case, of_case in times.items() for row in _rows(case, of_case)]
    return [{**row, "name": f"{row['name']}_{threads}t"} for row in rows]


def _check_answers(case: str, calls: dict[str, Call]) -> None:
    """All executions of a case give the same class logits, or their times mean nothing."""
    expected = None
    for name, call in calls.items():
        answer = call()
        class_logits = np.asarray(answer[0] if isinstance(answer, tuple) else answer)
        expected = class_logits if expected is None else expected
        error = np.linalg.norm(class_logits.reshape(expected.shape) - expected)
        if not error < 1e-3 * np.linalg.norm(expected):
            raise InputError(f"{case}: {name} answers otherwise than the first execution")


def _run() -> None:
    values = flags.FLAGS
    output = flags_lib.read_output()
    spec = flags_lib.read_section(ModelConfig).spec(num_classes=values.num_classes)
    size, peer_size = values.batch_size, values.peer_batch_size
    if not 0 < peer_size <= size:
        raise InputError(
            f"--peer_batch_size={peer_size} is not within --batch_size={size}: choose 1 to {size}"
        )
    if values.workdir:
        trained_run.choose_variant(trained_run.open_run(values.workdir), values.variant)
    trained = (values.workdir, values.variant, values.data_dir)
    rows = predictor_memory.rows(spec)
    for threads in _THREADS:
        rows += _measure(spec, trained, (size, peer_size), values.rounds, threads)
    reporting.write_report(output, benchmark="skip_speedup", results=rows)
    reporting.print_rows(rows)


def main() -> None:
    _define_flags()
    flags_lib.start(_run)


if __name__ == "__main__":
    main()
