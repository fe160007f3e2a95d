"""The stages, over one device and over four."""

import concurrent.futures
import dataclasses
import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instanas_jax import (
    augment,
    channels,
    controller,
    data_sources,
    optimizers,
    parallel,
    policy,
    search,
    stages,
    train_loop,
    train_state,
)
from instanas_jax import data as data_lib
from instanas_jax.search_space import preset, uniform_architecture
from instanas_jax.stage import (
    Phase,
    Setting,
    Stage,
    draw_keys,
    policy_logits_of,
    supernet_update,
)
from tests.networks import as_if_trained

SPEC = preset("tiny", num_classes=10)
IMAGES = data_lib.split(
    data_sources.synthetic(train_size=64, test_size=8), validation_size=16
).train
BATCH = 16
CELLS_MS = np.linspace(0.1, 1.0, 20).reshape(4, 5)


def make_setting(axis_name: str | None) -> Setting:
    return Setting(
        spec=SPEC,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        augmentation=augment.Augmentation(pad=4, flip=True, cutout=16),
        seed=3,
        lowering="shifted",
        axis_name=axis_name,
    )


def make_stage(name: str, axis_name: str | None):
    setting = make_setting(axis_name)
    if name == "finetune_dropout":
        setting = dataclasses.replace(setting, spec=dataclasses.replace(SPEC, head_dropout=0.5))
    sgd = optimizers.SgdSettings(0.05, weight_decay=1e-4)
    if name == "pretrain":
        every_path = np.ones(SPEC.mask_shape, bool)
        return stages.pretrain(setting, sgd=sgd, total_steps=4, paths=every_path)
    if name.startswith("search"):
        reward = search.RewardSettings(
            lower_ms=0.5, upper_start_ms=10.0, upper_end_ms=4.0, negative_weight=-1.0
        )
        if name != "search":
            reward = dataclasses.replace(reward, advantage="standardised")
        if name in ("search_by_samples", "search_divided_plain"):
            reward = dataclasses.replace(reward, samples=3)
        if name in ("search_ours", "search_divided"):
            reward = dataclasses.replace(
                reward,
                task="information",
                advantage="leave_one_out",
                samples=2,
                diversity_weight=0.5,
            )
        if name == "search_divided_alike":
            reward = dataclasses.replace(
                reward, samples=3, diversity_weight=0.5, diversity_kind="joint"
            )
        cells_ms, settled = CELLS_MS, None
        if name == "search_settled":
            reward = dataclasses.replace(reward, diversity_weight=0.5, diversity_kind="joint")
            settled = some_settled()
            cells_ms = CELLS_MS * settled.off  # Only what is off for good takes time,
            cells_ms[3, channels.BASIC_OP] = 0.0  # but for the op that cell 3 must run then.
        return search.search(
            setting,
            cells_ms=cells_ms,
            reward=reward,
            controller_rate=lambda step: 1e-3,
            supernet_sgd=sgd,
            total_steps=4,
            alternation_steps=1,
            settled=settled,
        )
    settled = {
        "static": policy.Settled.architecture(uniform_architecture(SPEC, 0)),
        "finetune_settled": some_settled(),
    }.get(name, policy.Settled.nothing(SPEC.mask_shape))
    mixing = {"cut_mix": 0.75, "label_smoothing": 0.1} if name == "finetune_mixed" else {}
    return stages.finetune(setting, name=name, sgd=sgd, total_steps=4, settled=settled, **mixing)


def some_settled() -> policy.Settled:
    """Cell 0 runs op 1 and maybe op 0, cell 1 what images ask for, the others nothing."""
    on, off = np.zeros((2, *SPEC.mask_shape), bool)
    on[0, 1] = True
    off[0, 2:] = off[2:] = True
    return policy.Settled(on, off)


@functools.cache
def fresh_state():
    """At step 0, with networks in which every path has a say, as trees."""
    state = train_state.create(jax.random.key(0), SPEC)
    return jax.device_get(state.replace(supernet=as_if_trained(state.supernet)))


@functools.cache
def divided_state():
    """As `fresh_state`, with a policy that tells images apart and leaves cells empty."""
    state = fresh_state()
    linear = state.controller["params"]["logits"]
    divided = {"kernel": 100.0 * linear["kernel"], "bias": linear["bias"] - 2.0}
    params = {**state.controller["params"], "logits": divided}
    return state.replace(controller={**state.controller, "params": params})


@functools.cache
def settled_state():
    """As `fresh_state`, with a controller that has settled `some_settled`."""
    state = fresh_state()
    return state.replace(controller=controller.settle(state.controller, some_settled()))


def start_of(name: str):
    if "divided" in name:
        return divided_state()
    return settled_state() if name == "search_settled" else fresh_state()


@functools.cache
def compile_for(function, devices: int):
    return jax.pmap(function, axis_name=parallel.AXIS_NAME, devices=jax.devices()[:devices])


@functools.cache
def make_cached(name: str):
    return make_stage(name, parallel.AXIS_NAME)


@functools.cache
def train(name: str, *, devices: int):
    """Replicas of the raveled state, and metrics, after each of four steps on so many devices."""
    stage = make_cached(name)
    programs = [
        (compile_for(phase.prepare, devices), compile_for(phase.update, devices))
        for phase in stage.phases
    ]

    def split(array):
        return array.reshape(devices, -1, *array.shape[1:])

    state = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf, (devices, *np.shape(leaf))),
        train_state.ravel(start_of(name)),
    )
    history = []
    batches = data_lib.train_batches(IMAGES, batch_size=BATCH, seed=1, num_steps=4)
    for index, batch in enumerate(batches):
        prepare, update = programs[stage.phase_at(index)]
        state, metrics = update(state, prepare(state, jax.tree.map(split, dict(batch))))
        history.append(jax.device_get((state, metrics)))
    return history


@pytest.mark.parametrize(
    "name",
    [
        "pretrain",
        "search",
        "search_by_samples",
        "search_ours",
        "search_divided",
        "search_settled",
        "finetune_mixed",
    ],
)
def test_four_devices_train_as_one(name):
    """Same global batches: parameters, running statistics and metrics agree to rounding.

    Four steps, two in each phase of the search: longer, its discrete choices amplify rounding.
    """
    assert jax.local_device_count() == 4
    one, one_metrics = train(name, devices=1)[-1]
    four, four_metrics = train(name, devices=4)[-1]
    for network in ("supernet", "controller"):
        ours, theirs = getattr(one, network), getattr(four, network)
        for kind in ("params", "batch_stats"):
            a, b = ours[kind].vector[0], theirs[kind].vector[0]
            assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a), (network, kind)
    for leaf in jax.tree.leaves(four):  # The replicas stay equal, bit for bit.
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    for metric in one_metrics:
        np.testing.assert_allclose(
            one_metrics[metric][0], four_metrics[metric][0], rtol=2e-3, atol=1e-4, err_msg=metric
        )


def test_dropout_is_the_same_on_any_number_of_devices():
    """One step: it doubles what features weigh, and rounding grows the faster."""
    one, four = (train("finetune_dropout", devices=devices)[0][0] for devices in (1, 4))
    a, b = (state.supernet["params"].vector[0] for state in (one, four))
    assert np.linalg.norm(a - b) < 2e-5 * np.linalg.norm(a)
    without = train("finetune", devices=1)[0][0].supernet["params"].vector[0]
    assert np.linalg.norm(a - without) > 1e-4 * np.linalg.norm(a)


def first_replica(state):
    """As trees."""
    return train_state.unravel(jax.tree.map(lambda leaf: leaf[0], state))


def moved(before, after) -> bool:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return any(not np.array_equal(a, b[0]) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "supernet_moves", "controller_moves"),
    [
        ("pretrain", True, False),
        ("search", False, True),  # The first phase trains the controller.
        ("finetune", True, False),
    ],
)
def test_a_phase_moves_its_own_network_alone(name, supernet_moves, controller_moves):
    state, _ = train(name, devices=1)[0]
    start = train_state.ravel(fresh_state())
    assert moved(start.supernet, state.supernet) == supernet_moves
    assert moved(start.controller, state.controller) == controller_moves


def test_a_static_baseline_moves_its_own_op_alone():
    state, _ = train("static", devices=1)[0]
    before = fresh_state().supernet["params"]["cell_00"]
    after = first_replica(state).supernet["params"]["cell_00"]
    used = "project_mbconv_k3_e6"
    # Weight decay shrinks the others; no gradient reaches them.
    decayed = 1 - 0.05 * 1e-4 * 1.9
    unused = before["basic_first"]["kernel"]
    np.testing.assert_allclose(after["basic_first"]["kernel"], unused * decayed, rtol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            after[used]["kernel"], before[used]["kernel"] * decayed, rtol=1e-5
        )


def test_settled_decisions_change_what_is_computed_and_nothing_else():
    """With a settled controller, the update that computes fewer paths is the one of all paths."""
    settled = some_settled()
    batch = next(iter(data_lib.train_batches(IMAGES, batch_size=BATCH, seed=1, num_steps=1)))
    state = fresh_state()
    state = state.replace(
        controller=controller.settle(undecided_about(state, batch["image"]), settled)
    )

    def updated(stage):
        phase = stage.phases[0]
        raveled = train_state.ravel(state)
        inputs = jax.jit(phase.prepare)(raveled, dict(batch))
        new_state, metrics = jax.jit(phase.update)(raveled, inputs)
        return inputs["mask"], (train_state.unravel(jax.device_get(new_state)), metrics)

    few_masks, (few, few_metrics) = updated(make_stage("finetune_settled", None))
    all_masks, (every, all_metrics) = updated(make_stage("finetune", None))
    np.testing.assert_array_equal(few_masks, all_masks)
    assert len(np.unique(few_masks, axis=0)) > 1
    np.testing.assert_allclose(few_metrics["loss"], all_metrics["loss"], rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        few.supernet["params"],
        every.supernet["params"],
    )
    # A path that is off for good is not computed: its statistics stay.
    before, after_few, after_all = (
        variables["batch_stats"]["cell_03"]["project_mbconv_k3_e6"]["mean"]
        for variables in (state.supernet, few.supernet, every.supernet)
    )
    np.testing.assert_array_equal(after_few, before)
    assert not np.array_equal(after_all, before)


def test_pretraining_of_some_paths_draws_and_trains_no_others():
    """Where those paths are on in every image, the update is that of all paths under one mask."""
    setting, sgd = make_setting(None), optimizers.SgdSettings(0.05)
    paths = np.eye(5, dtype=bool)[[0, 2, 4, 1]] | np.eye(5, dtype=bool)[0]
    batch = next(iter(data_lib.train_batches(IMAGES, batch_size=BATCH, seed=1, num_steps=1)))
    state = train_state.ravel(fresh_state())

    def phase(**options):
        return stages.pretrain(setting, sgd=sgd, total_steps=4, **options).phases[0]

    half = phase(paths=paths, final_keep=0.5, dropout_start=0.0, dropout_end=1e-6)
    masks = np.asarray(half.prepare(state.replace(step=np.int32(1)), dict(batch))["mask"])
    forced = setting.spec.forced_cells
    assert not masks[:, ~paths].any() and 0.3 < masks[:, paths & ~forced[:, None]].mean() < 0.7
    assert masks[:, forced].any(axis=-1).all()
    some, every = phase(paths=paths), phase(paths=np.ones_like(paths))
    inputs = some.prepare(state, dict(batch))
    np.testing.assert_array_equal(inputs["mask"], np.broadcast_to(paths, (BATCH, *paths.shape)))
    few, all_ = (jax.jit(one.update)(state, inputs)[0] for one in (some, every))
    np.testing.assert_allclose(
        few.supernet["params"].vector, all_.supernet["params"].vector, rtol=1e-4, atol=1e-6
    )
    statistics = [
        train_state.unravel(jax.device_get(one)).supernet["batch_stats"]["cell_02"]
        for one in (state, few, all_)
    ]
    untouched, same, moved_on = (one["project_mbconv_k3_e3"]["mean"] for one in statistics)
    np.testing.assert_array_equal(untouched, same)
    assert not np.array_equal(same, moved_on)


def test_a_search_leaves_what_is_settled_as_it_is():
    settled = some_settled()
    constant = settled.on | settled.off
    (_, metrics), *_, (last, _) = train("search_settled", devices=1)
    before = settled_state().controller["params"]["logits"]
    after = first_replica(last).controller["params"]["logits"]
    for name in ("kernel", "bias"):
        changed = (after[name] != before[name]).reshape(-1, *SPEC.mask_shape)
        assert not changed[:, constant].any() and changed[:, ~constant].all(axis=0).any()
    found = controller.settled(SPEC, first_replica(last).controller)
    np.testing.assert_array_equal(found.on, settled.on)
    np.testing.assert_array_equal(found.off, settled.off)
    # Neither phase samples beyond it, as a bounded policy would: the controller's takes no time,
    # because only what is off for good would.
    assert metrics["sampled_latency_ms"][0] == 0.0 and metrics["sampled_reward"][0] <= 0.0
    prepare = make_stage("search_settled", None).phases[1].prepare
    batch = next(iter(data_lib.train_batches(IMAGES, batch_size=BATCH, seed=1, num_steps=1)))
    masks = np.asarray(jax.jit(prepare)(train_state.ravel(settled_state()), dict(batch))["mask"])
    assert (masks[:, settled.on] == 1.0).all() and (masks[:, settled.off] == 0.0).all()
    assert 0.0 < masks[:, ~constant].mean() < 1.0


def test_finetuning_over_thresholds_draws_one_an_image():
    setting, spread = make_setting(None), 0.5
    batch = next(iter(data_lib.train_batches(IMAGES, batch_size=BATCH, seed=1, num_steps=1)))
    state = fresh_state()
    state = train_state.ravel(state.replace(controller=undecided_about(state, batch["image"])))

    def masks_of(**options):
        stage = stages.finetune(
            setting,
            name="finetune",
            sgd=optimizers.SgdSettings(0.05),
            total_steps=4,
            settled=policy.Settled.nothing(SPEC.mask_shape),
            **options,
        )
        inputs = jax.jit(stage.phases[0].prepare)(state, dict(batch))
        return inputs["mask"], policy_logits_of(setting, state, inputs["image"])

    masks, policy_logits = masks_of(threshold_spread=spread)
    keys = draw_keys(setting, "finetune", state.step, BATCH).mask
    thresholds = policy.random_thresholds(keys, spread)
    assert thresholds.shape == (BATCH, 1, 1) and float(jnp.abs(thresholds).max()) <= spread
    assert len(np.unique(thresholds)) == BATCH and thresholds.min() < 0.0 < thresholds.max()
    clear = jnp.abs(policy_logits - thresholds) > 1e-4  # Of two programs' rounding.
    np.testing.assert_array_equal(masks[clear], (policy_logits >= thresholds)[clear])
    without, _ = masks_of()
    assert not np.array_equal(masks, without)


def test_no_key_is_drawn_for_two_uses():
    """Of images, steps and stages: augmentation, masks and mixing have keys of their own."""
    setting, keys = make_setting(None), []
    for stage, step in itertools.product(("search", "finetune"), (0, 1)):
        draws = draw_keys(setting, stage, jnp.asarray(step), BATCH)
        for use in (draws.augment, draws.mask, draws.mix, draws.batch[None]):
            keys.extend(map(tuple, np.asarray(jax.random.key_data(use))))
    assert len(set(keys)) == len(keys) == 4 * (3 * BATCH + 1)


def test_finetuning_answers_mixed_images_by_mixed_and_smoothed_labels():
    batch = next(iter(data_lib.train_batches(IMAGES, batch_size=BATCH, seed=1, num_steps=1)))
    state = train_state.ravel(fresh_state())

    def inputs_of(**options):
        stage = stages.finetune(
            make_setting(None),
            name="finetune",
            sgd=optimizers.SgdSettings(0.05),
            total_steps=4,
            settled=policy.Settled.nothing(SPEC.mask_shape),
            **options,
        )
        return jax.jit(stage.phases[0].prepare)(state, dict(batch))

    plain, mixed = inputs_of(), inputs_of(cut_mix=1.0, label_smoothing=0.1)
    smoothed = inputs_of(label_smoothing=0.2)
    own = np.asarray(jax.nn.one_hot(batch["label"], SPEC.num_classes))
    np.testing.assert_array_equal(plain["target"], own)
    np.testing.assert_allclose(smoothed["target"], 0.8 * own + 0.2 / SPEC.num_classes, rtol=1e-5)
    np.testing.assert_array_equal(smoothed["image"], plain["image"])
    draws = draw_keys(make_setting(None), "finetune", state.step, BATCH)
    images, others, share = augment.cut_mix(
        draws.mix, plain["image"], batch["label"], probability=1.0
    )
    np.testing.assert_allclose(mixed["image"], images, rtol=1e-6)
    other = np.asarray(jax.nn.one_hot(others, SPEC.num_classes))
    target = share[:, None] * own + (1.0 - share[:, None]) * other
    np.testing.assert_allclose(mixed["target"], 0.9 * target + 0.1 / SPEC.num_classes, rtol=1e-5)
    np.testing.assert_array_equal(mixed["label"], batch["label"])
    assert not np.array_equal(plain["mask"], mixed["mask"])  # The policy sees what results.
    # The loss is linear in the targets: half of each gives the mean of two losses.
    update = jax.jit(supernet_update(make_setting(None)))
    losses = [
        float(update(state, {**plain, "target": target})[1]["loss"])
        for target in (own, other, (own + other) / 2)
    ]
    assert abs(losses[0] - losses[1]) > 1e-2
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-4)


def undecided_about(state, images):
    """The state's controller with logits whose means over these images are zero."""
    policy_logits = policy_logits_of(
        make_setting(None), train_state.ravel(state), images / np.float32(255)
    )
    linear = state.controller["params"]["logits"]
    bias = linear["bias"] - np.asarray(policy_logits).mean(axis=0).ravel()
    return {
        **state.controller,
        "params": {**state.controller["params"], "logits": {**linear, "bias": bias}},
    }


def test_samples_of_one_image_differ():
    """Three masks an image have, by their mean, another latency than one of them."""
    one, three = (train(name, devices=1)[0][1] for name in ("search", "search_by_samples"))
    np.testing.assert_allclose(one["greedy_latency_ms"], three["greedy_latency_ms"], rtol=1e-6)
    assert abs(one["sampled_latency_ms"] - three["sampled_latency_ms"]) > 1e-3


def test_every_sample_of_an_image_is_a_draw_of_its_own():
    setting = make_setting(None)
    draws = draw_keys(setting, "search", jnp.zeros((), jnp.int32), BATCH)
    policy_logits = jnp.zeros((BATCH, *SPEC.mask_shape))
    masks = search._sample_masks(draws, policy_logits, bounding=0.8, samples=3)
    masks = masks.reshape(3, BATCH, -1)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        # Independent fair bits agree in half of the places.
        assert 0.4 < float(jnp.mean(masks[first] == masks[second])) < 0.6


def test_standardised_advantages_change_the_loss_alone():
    """Same masks and rewards at the first update as without."""
    plain, standardised = (
        train(name, devices=1)[0][1] for name in ("search", "search_standardised")
    )
    for name in ("sampled_reward", "greedy_reward", "policy_entropy_nats"):
        np.testing.assert_allclose(plain[name], standardised[name], rtol=1e-6)
    assert abs(plain["controller_loss"] - standardised["controller_loss"]) > 1e-2


def test_information_of_the_policy_lowers_the_loss_by_its_weight():
    plain, informed = (
        train(name, devices=1)[0][1] for name in ("search_divided_plain", "search_divided_alike")
    )
    assert plain["depth_information_nats"] > 1e-2
    information = informed["depth_information_nats"]
    assert information > 1e-3
    # Of cells one by one by default, which is another number.
    assert abs(plain["depth_information_nats"] - information) > 1e-3
    np.testing.assert_allclose(
        informed["controller_loss"], plain["controller_loss"] - 0.5 * information, atol=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Samples of 3 and 1 for one image, 5 and 5 for the other; greedy 2 and 4. Less greedy:
        # 1, 1, -1, 1, of mean 0.5 and spread sqrt(0.75). Less the other sample: 2, 0, -2, 0, of
        # spread sqrt(2).
        ("self_critical", [[1.0, 1.0], [-1.0, 1.0]]),
        ("standardised", [[0.57735, 0.57735], [-1.73205, 0.57735]]),
        ("leave_one_out", [[1.41421, 0.0], [-1.41421, 0.0]]),
    ],
)
def test_advantages_of_each_kind(kind, expected):
    reward = search.RewardSettings(
        lower_ms=0.5, upper_start_ms=10.0, upper_end_ms=4.0, samples=2, advantage=kind
    )
    advantage = search._advantage(
        jnp.array([[3.0, 5.0], [1.0, 5.0]]), jnp.array([2.0, 4.0]), reward, make_setting(None)
    )
    np.testing.assert_allclose(advantage, expected, atol=1e-4)


def test_a_task_reward_by_information_is_between_zero_and_one():
    right, informed = (train(name, devices=1)[0][1] for name in ("search", "search_ours"))
    # The same greedy masks: a wrong answer weighs -1, what it knows nevertheless more than 0.
    np.testing.assert_allclose(right["greedy_latency_ms"], informed["greedy_latency_ms"], rtol=1e-6)
    assert right["greedy_accuracy"] == informed["greedy_accuracy"]
    assert right["greedy_reward"] < 0.0 < informed["greedy_reward"] < 1.0


def test_the_search_alternates_phases():
    stage = make_stage("search", None)
    assert [stage.phases[stage.phase_at(step)].name for step in range(4)] == [
        "controller",
        "supernet",
        "controller",
        "supernet",
    ]


def test_path_keep_probability_is_one_then_falls_linearly():
    # 1 until half way; then 1 - 0.5 * (2p - 1): 0.75 at p = 0.75.
    values = [float(stages.path_keep_probability(p, final=0.5)) for p in (0, 0.5, 0.75, 1.0)]
    assert values == [1.0, 1.0, 0.75, 0.5]


def test_learning_rate_schedules():
    step = optimizers.learning_rate_schedule("step", learning_rate=1.0, total_steps=8)
    rates = [float(step(i)) for i in (0, 3, 4, 5, 6)]
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.01], rtol=1e-6)
    cosine = optimizers.learning_rate_schedule("cosine", learning_rate=2.0, total_steps=4)
    np.testing.assert_allclose([cosine(i) for i in (0, 2, 4)], [2.0, 1.0, 0.0], atol=1e-6)
    one_cycle = optimizers.learning_rate_schedule("one_cycle", learning_rate=1.0, total_steps=10)
    assert max(float(one_cycle(i)) for i in range(11)) == pytest.approx(1.0)
    assert float(one_cycle(10)) < 0.01


def test_nesterov_sgd_by_hand():
    # g = 1 + 0.1 * 1 (decay); trace = 1.1; Nesterov step = g + 0.9 * trace = 2.09.
    optimizer = optimizers.sgd(0.1, 0.9, 0.1)
    params = np.float32(1.0)
    updates, _ = optimizer.update(np.float32(1.0), optimizer.init(params), params)
    np.testing.assert_allclose(updates, -0.209, rtol=1e-6)


def test_fresh_optimizer_states_are_optaxs_own():
    state = fresh_state()
    expected = {
        "supernet": optimizers.sgd(0.1, 0.9, 0.0).init(state.supernet["params"]),
        "controller": optimizers.adam(0.1).init(state.controller["params"]),
    }
    assert jax.tree.structure(state.optimizer) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, expected)


def test_a_raveled_state_is_few_vectors_and_comes_back():
    state = fresh_state()
    raveled = train_state.ravel(state)
    # The step; two networks' parameters and statistics; one momentum; Adam's count and two moments.
    assert len(jax.tree.leaves(raveled)) == 1 + 4 + 1 + 3
    back = train_state.unravel(raveled)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_what_compiles_ahead_is_what_runs():
    """Host values of 64 bits included, which devices hold in 32."""

    def prepare(state, batch):
        return {"sum": jnp.sum(batch["image"]) + state["offset"]}

    def update(state, inputs):
        return {**state, "total": state["total"] + inputs["sum"]}, {"sum": inputs["sum"]}

    stage = Stage("toy", (Phase("toy", prepare, update),))
    state = {"offset": np.float64(1.0), "total": np.float32(0.0)}
    batch = {"image": np.ones((8, 2), np.float32)}
    programs = [parallel.compile_map(prepare), parallel.compile_step(update)]
    train_loop.compile_ahead(stage, state, batch)
    compiled = [dict(program._compiled) for program in programs]
    ((done, after, _),) = train_loop.run(stage, parallel.replicate(state), [parallel.shard(batch)])
    assert done == 1
    # Each of four devices holds two of the eight rows of two ones.
    assert float(parallel.unreplicate(after)["total"]) == 5.0
    for program, before in zip(programs, compiled, strict=True):
        assert len(before) == 1 and program._compiled == before


def test_what_is_compiled_runs_while_other_shapes_compile():
    may_go_on, tracing = threading.Event(), threading.Event()

    def double(x):
        if x.shape[-1] == 3:
            tracing.set()
            assert may_go_on.wait(timeout=60.0)
        return x * 2

    program = parallel.Program(double)
    pair, triple = (parallel.replicate(np.ones(size, np.float32)) for size in (2, 3))
    program.compile(pair)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        compiling = threads.submit(program.compile, triple)
        try:
            assert tracing.wait(timeout=60.0)
            doubled = threads.submit(program, pair).result(timeout=30.0)
            assert not compiling.done()
        finally:
            may_go_on.set()
    np.testing.assert_array_equal(parallel.unreplicate(doubled), [2.0, 2.0])


def test_replicated_arrays_are_no_views_of_the_hosts():
    """Which a program could not take over, but would copy while its temporaries are there."""
    aligned = np.zeros(64 + 4096, np.uint8)
    start = -aligned.ctypes.data % 64  # Where JAX would otherwise take the host's memory.
    host = aligned[start : start + 4096].view(np.float32)
    replicated = parallel.replicate(host)
    assert jax.local_device_count() > 1
    for shard in replicated.addressable_shards:
        place = shard.data.unsafe_buffer_pointer()
        assert not host.ctypes.data <= place < host.ctypes.data + host.nbytes
