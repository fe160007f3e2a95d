"""Everything a run can be told, as frozen dataclasses; each field is a command-line flag."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from experiments import settings
from experiments.settings import setting
from instanas_jax.augment import Augmentation
from instanas_jax.errors import InputError
from instanas_jax.optimizers import SCHEDULE_KINDS
from instanas_jax.policy_gradient import ADVANTAGE_KINDS
from instanas_jax.rewards import TASK_REWARD_KINDS
from instanas_jax.search_space import (
    CANDIDATE_OPS,
    CONTROLLERS,
    JOINS,
    PRESETS,
    SupernetSpec,
    op_index,
    preset,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    data_dir: str = setting(
        "", "Folder of prepared TFDS data sets; empty: TFDS_DATA_DIR or TFDS's own default."
    )
    data_workers: int = setting(
        0,
        "Processes that decode images of data sets that do not fit into memory; 0: threads of this "
        "one. Changes no batch.",
        minimum=0,
        maximum=256,
    )
    validation_size: int = setting(
        5000, "Images cut from the training split for validation.", minimum=1
    )
    train_limit: int = setting(0, "Use at most this many training images; 0: all.", minimum=0)
    test_limit: int = setting(0, "Use at most this many test images; 0: all.", minimum=0)
    crop_pad: int = setting(
        4,
        "Augmentation: pixels of padding before a crop; 0: no crop.",
        minimum=0,
        maximum=16,
    )
    flip: bool = setting(True, "Augmentation: mirror half of the images.")
    cutout: int = setting(
        16,
        "Augmentation: side in pixels of a blanked square; 0: none.",
        minimum=0,
        maximum=64,
    )

    @property
    def augmentation(self) -> Augmentation:
        """What training images undergo."""
        return Augmentation(pad=self.crop_pad, flip=self.flip, cutout=self.cutout)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    preset: str = setting("px32", "Supernet preset.", choices=PRESETS)
    width: float = setting(1.0, "Width multiplier of the supernet.", minimum=0.1, maximum=4.0)
    stem_stride: int = setting(
        0, "Stride of the stem in pixels; 0: the preset's.", minimum=0, maximum=2
    )
    join: str = setting(
        "sum", "How a cell's active paths become one: the paper's sum, or mean.", choices=JOINS
    )
    head_channels: int = setting(
        0,
        "Channels of the layer before the classifier; 0: the preset's, widened by --width above 1.",
        minimum=0,
    )
    controller: str = setting(
        "",
        "Controller: a published residual network, or patches, two small layers that are far "
        "faster; empty: the preset's.",
        choices=("", *CONTROLLERS),
    )
    controller_channels: int = setting(
        0, "Channels of the controller's first layer; 0: the preset's.", minimum=0
    )
    controller_pool: int = setting(
        0, "The controller sees images shrunk by 1, 2 or 4; 0: the preset's.", minimum=0, maximum=4
    )
    dtype: str = setting("float32", "Type of activations.", choices=("float32", "bfloat16"))

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the preset reads."""
        return preset(self.preset, num_classes=2).image_size

    def spec(self, *, num_classes: int) -> SupernetSpec:
        """The supernet that these settings ask for."""
        return preset(
            self.preset,
            num_classes=num_classes,
            width=self.width,
            stem_stride=self.stem_stride or None,
            head_channels=self.head_channels or None,
            controller=self.controller or None,  # pyright: ignore[reportArgumentType]
            controller_channels=self.controller_channels or None,
            controller_pool=self.controller_pool or None,
            join=self.join,  # pyright: ignore[reportArgumentType]
        )


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    epochs: float = setting(200.0, "Passes over the training images.", minimum=0.0)
    batch_size: int = setting(64, "Images an update, over all devices.", minimum=1)
    learning_rate: float = setting(0.1, "Peak rate of SGD with momentum 0.9.", minimum=0.0)
    schedule: str = setting("step", "Learning-rate schedule.", choices=SCHEDULE_KINDS)
    weight_decay: float = setting(1e-4, "L2 penalty.", minimum=0.0)
    final_keep: float = setting(
        0.5, "Path dropout: probability that a path is on at the end.", minimum=0.05, maximum=1.0
    )
    dropout_start: float = setting(
        0.5, "Path dropout: share of the epochs with all paths on.", minimum=0.0, maximum=0.99
    )
    dropout_end: float = setting(
        1.0, "Path dropout: share of the epochs after which it stays.", minimum=0.01, maximum=1.0
    )


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    epochs: float = setting(500.0, "Passes over the images, both phases together.", minimum=0.0)
    batch_size: int = setting(32, "Images an update, over all devices.", minimum=1)
    alternation: str = setting(
        "epoch", "Controller and supernet take turns by epoch or batch.", choices=("epoch", "batch")
    )
    controller_learning_rate: float = setting(5e-4, "Rate of Adam.", minimum=0.0)
    controller_decay_epochs: float = setting(
        100.0, "Controller's rate falls to a tenth after this many epochs; 0: never.", minimum=0.0
    )
    start_keep: float = setting(
        0.5, "Probability of a path when the search begins.", minimum=0.01, maximum=0.99
    )
    start_op: str = setting(
        "",
        "Op that begins likelier on than off, so that greedy masks begin as the architecture of "
        "this op alone; empty: none.",
        choices=("", *(op.name for op in CANDIDATE_OPS)),
    )
    scope: str = setting(
        "paths",
        "What the policy decides: paths, every one, as published; or depth, which of the cells "
        "that may be empty run --search_start_op. The others then run it for every image.",
        choices=("paths", "depth"),
    )
    supernet_learning_rate: float = setting(5e-4, "Rate of plain SGD.", minimum=0.0)
    task_reward: str = setting(
        "right",
        "What gates the latency reward: an answer that is right, or its information: 1 less its "
        "cross-entropy as a share of a guess's.",
        choices=TASK_REWARD_KINDS,
    )
    positive_weight: float = setting(30.0, "Reward weight of a right answer.", minimum=0.0)
    negative_weight: float = setting(0.0, "Reward of a wrong answer, 0 or less.", maximum=0.0)
    latency_exponent: float = setting(1.0, "Exponent of the latency reward.", minimum=0.0)
    bounding: float = setting(
        0.8, "Paper's alpha: bounds probabilities away from 0 and 1.", minimum=0.5, maximum=1.0
    )
    entropy_weight: float = setting(0.8, "Paper's beta: weight of the entropy.", minimum=0.0)
    entropy_kind: str = setting(
        "one_sided", "Entropy: the authors' one-sided or binary.", choices=("one_sided", "binary")
    )
    diversity_weight: float = setting(
        0.0,
        "Weight of the information of an image about which cells run, which keeps policies looking "
        "at the image.",
        minimum=0.0,
    )
    advantage: str = setting(
        "self_critical",
        "Sampled less greedy reward, as it is or standardised over the batch; or less the other "
        "samples' reward, standardised.",
        choices=ADVANTAGE_KINDS,
    )
    samples: int = setting(1, "Masks drawn an image for one controller update.", minimum=1)
    upper_bound_start: float = setting(
        0.7, "Latency bound at the start, as a share of all paths on.", minimum=0.01
    )
    upper_bound_end: float = setting(
        0.5, "Latency bound at the end, as a share of MobileNetV2's latency.", minimum=0.01
    )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    epochs: float = setting(300.0, "Passes over the images, for each variant.", minimum=0.0)
    start: str = setting(
        "search",
        "Weights that variants start from: the search's, as published, or the pretrained ones, as "
        "static baselines do; these then train no longer than variants.",
        choices=("search", "pretrain"),
    )
    batch_size: int = setting(256, "Images an update, over all devices.", minimum=1)
    learning_rate: float = setting(1e-3, "Peak rate of SGD with momentum 0.9.", minimum=0.0)
    schedule: str = setting("cosine", "Learning-rate schedule.", choices=SCHEDULE_KINDS)
    weight_decay: float = setting(4e-5, "L2 penalty.", minimum=0.0)
    settle_tolerance: float = setting(
        0.0,
        "Share of the training images that may disagree with the others about a path for its "
        "decision to be settled: the same for every image, from finetuning on.",
        minimum=0.0,
        maximum=0.49,
    )
    threshold_spread: float = setting(
        0.0,
        "Every image is decided at a threshold of its logits drawn from 0 plus or minus this, so "
        "that one network learns many latency budgets; what changes within is not settled.",
        minimum=0.0,
        maximum=10.0,
    )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    seed: int = setting(0, "Seed of weights, batches, augmentation and masks.", minimum=0)
    variants: int = setting(
        5, "Snapshots of the search that are finetuned and reported.", minimum=1, maximum=26
    )
    static_ops: tuple[str, ...] = setting(
        (CANDIDATE_OPS[0].name,),
        "Ops of which to train a one-op static baseline; "
        f"{CANDIDATE_OPS[0].name} is MobileNetV2's. Others: "
        f"{', '.join(op.name for op in CANDIDATE_OPS[1:])}.",
    )
    inference_threads: int = setting(
        1,
        "Threads on which one image is answered: for the latency table and measured_ms, and later "
        "for predictions. Narrow networks are fastest on 1.",
        minimum=1,
    )
    remat: bool = setting(
        False,
        "Compute cells again for their gradient: less memory, more time in training. For "
        "accelerators; XLA for CPUs finds the repeated part and drops it.",
    )
    profile_rounds: int = setting(50, "Timed calls of each path in the table.", minimum=1)
    timed_images: int = setting(200, "Test images on which measured_ms is timed.", minimum=1)
    eval_epochs: float = setting(
        1.0, "Passes between validation, with a checkpoint each time.", minimum=1e-6
    )
    log_steps: int = setting(20, "Updates between rows of the metrics files.", minimum=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Flags of a stage carry its name in front: --pretrain_epochs."""

    dataset: str
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    pretrain: PretrainConfig = PretrainConfig()
    search: SearchConfig = SearchConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    run: RunConfig = RunConfig()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without where the data lies and who decodes it: neither is part of
        the experiment."""
        values = dataclasses.asdict(self)
        del values["data"]["data_dir"], values["data"]["data_workers"]
        values["run"]["static_ops"] = list(self.run.static_ops)
        return values

    @classmethod
    def from_json(cls, values: Any) -> "Config":
        """The configuration that `to_json` described; settings it does not name keep defaults.

        Raises:
          InputError: a setting is unknown, of another type, or out of range.
        """
        try:
            parts: dict[str, Any] = {
                section: kind(**values[section]) for section, kind, _ in sections()
            }
            static_ops = tuple(parts["run"].static_ops)
            parts["run"] = dataclasses.replace(parts["run"], static_ops=static_ops)
            for section, _, prefix in sections():
                validate_section(parts[section], prefix=prefix)
            return cls(dataset=values["dataset"], **parts)
        except (KeyError, TypeError) as error:
            raise InputError(f"a setting is missing, unknown or of another type: {error}") from None


_PREFIXES = {"pretrain": "pretrain_", "search": "search_", "finetune": "finetune_"}


def sections() -> Iterator[tuple[str, type, str]]:
    """Name, dataclass and flag prefix of each part of `Config`."""
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            yield field.name, field.type, _PREFIXES.get(field.name, "")  # pyright: ignore


def validate_section(section: Any, *, prefix: str = "") -> None:
    """InputError for the first setting of a part that is out of range."""
    settings.check(section, prefix=prefix)
    compares_samples = getattr(section, "advantage", "") == "leave_one_out"
    if compares_samples and section.samples < 2:
        raise InputError(
            "--search_advantage=leave_one_out compares an image's samples: draw "
            f"--search_samples of 2 or more, not {section.samples}"
        )
    if getattr(section, "scope", "") == "depth" and not section.start_op:
        raise InputError(
            "--search_scope=depth decides where one op runs: name it by --search_start_op"
        )
    if isinstance(section, RunConfig):
        if not section.static_ops:
            raise InputError("--static_ops is empty: name at least one op to compare with")
        for name in section.static_ops:
            op_index(name)
