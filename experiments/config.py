"""Everything a run can be told, as frozen dataclasses; each field is a command-line flag."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments import settings
from experiments.settings import setting
from experiments.stage_config import FinetuneConfig, PretrainConfig, SearchConfig
from instanas_jax.augment import Augmentation
from instanas_jax.errors import InputError
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


# Settings of the network itself: single images are always answered in float32.
SPEC_SETTINGS = tuple(
    field.name for field in dataclasses.fields(ModelConfig) if field.name != "dtype"
)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    # JAX's keys know seeds of 32 bits: 2^32 would be 0 to them.
    seed: int = setting(
        0, "Seed of weights, batches, augmentation and masks.", minimum=0, maximum=2**32 - 1
    )
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
    profile_rounds: int = setting(
        50, "Rounds of the latency table, each with eight timed calls of every path.", minimum=1
    )
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
            config = cls(dataset=values["dataset"], **parts)
            check_together(config)
            return config
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"a setting is missing, unknown or of another type: {error}") from None


def check_together(config: Config) -> None:
    """InputError where parts of a configuration do not fit each other."""
    names, spec = config.search.start_ops, config.model.spec(num_classes=2)
    if len(names) not in (0, 1, spec.num_cells):
        raise InputError(
            f"--search_start_op names {len(names)} ops: name one for all cells, or one for each of "
            f"the {spec.num_cells} of --preset={config.model.preset}"
        )
    if config.search.scope == "depth" and len(names) == spec.num_cells:
        for cell in np.flatnonzero(spec.forced_cells):
            if not names[cell]:
                raise InputError(
                    f"--search_start_op names no op for cell {cell}, which can't be empty: name "
                    f"one of {', '.join(op.name for op in CANDIDATE_OPS)}"
                )


_PREFIXES = {"pretrain": "pretrain_", "search": "search_", "finetune": "finetune_"}


def sections() -> Iterator[tuple[str, type, str]]:
    """Name, dataclass and flag prefix of each part of `Config`."""
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            yield field.name, field.type, _PREFIXES.get(field.name, "")  # pyright: ignore


def validate_section(section: Any, *, prefix: str = "") -> None:
    """InputError for the first setting of a part that is out of range."""
    settings.check(section, prefix=prefix)
    if isinstance(section, SearchConfig):
        if section.advantage == "leave_one_out" and section.samples < 2:
            raise InputError(
                "--search_advantage=leave_one_out compares an image's samples: draw "
                f"--search_samples of 2 or more, not {section.samples}"
            )
        unknown = {*section.start_ops} - {"", *(op.name for op in CANDIDATE_OPS)}
        if unknown:
            raise InputError(
                f"--{prefix}start_op={section.start_op}: unknown op '{min(unknown)}', choose from "
                f"{', '.join(op.name for op in CANDIDATE_OPS)}"
            )
        if section.scope == "depth" and not any(section.start_ops):
            raise InputError(
                "--search_scope=depth decides where a cell's op runs: name one for all cells, or "
                "one for each, by --search_start_op"
            )
    if isinstance(section, RunConfig):
        if not section.static_ops:
            raise InputError("--static_ops is empty: name at least one op to compare with")
        if len({*section.static_ops}) < len(section.static_ops):
            raise InputError(
                f"--static_ops={','.join(section.static_ops)} names an op twice: name each once"
            )
        for name in section.static_ops:
            op_index(name)
