"""What each stage of a run can be told, as frozen dataclasses; `config` puts them together."""

import dataclasses

from experiments.settings import setting
from instanas_jax.diversity import DIVERSITY_KINDS
from instanas_jax.optimizers import SCHEDULE_KINDS
from instanas_jax.policy_gradient import ADVANTAGE_KINDS
from instanas_jax.rewards import TASK_REWARD_KINDS
from instanas_jax.search_space import CANDIDATE_OPS


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
        "this op alone; with commas between, one for each cell. Empty, or no name between two "
        "commas: none; by --search_scope=depth such a cell never runs. Of "
        f"{', '.join(op.name for op in CANDIDATE_OPS)}.",
    )
    scope: str = setting(
        "paths",
        "What the policy decides: paths, every one, as published; or depth, which of the cells "
        "that may be empty run their --search_start_op. The others run it for every image.",
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
    diversity_kind: str = setting(
        "cells",
        "That information: summed over cells, or of all cells together, to which those that divide "
        "the images alike add nothing.",
        choices=DIVERSITY_KINDS,
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

    @property
    def start_ops(self) -> tuple[str, ...]:
        """Of all cells, or of each; none where no op begins likelier than others."""
        return tuple(name.strip() for name in self.start_op.split(",")) if self.start_op else ()


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    epochs: float = setting(300.0, "Passes over the images, for each variant.", minimum=0.0)
    start: str = setting(
        "search",
        "Weights that variants start from: the search's, as published; the pretrained ones, as "
        "static baselines do, which then train no longer than variants; or fresh ones, baselines "
        "too, of which the supernet then teaches no more than the policy.",
        choices=("search", "pretrain", "scratch"),
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
    open_share: float = setting(
        0.0,
        "Share of the updates, the first ones, that variants have in common: all images run every "
        "path that an image of any variant may run, so that each path learns from all of them. "
        "Where variants start from the search's weights, these begin with the last one's.",
        minimum=0.0,
        maximum=1.0,
    )
    threshold_spread: float = setting(
        0.0,
        "Every image is decided at a threshold of its logits drawn from 0 plus or minus this, so "
        "that one network learns many latency budgets; what changes within is not settled.",
        minimum=0.0,
        maximum=10.0,
    )
    cut_mix: float = setting(
        0.0,
        "Probability that a rectangle of an image is its neighbour's in the batch, and that share "
        "of what it should be called as well. For long training; metrics of training then count "
        "by the image's own label. Several devices need an even number of a batch each.",
        minimum=0.0,
        maximum=1.0,
    )
    label_smoothing: float = setting(
        0.0, "Share of the label that is spread over all classes.", minimum=0.0, maximum=0.9
    )
