import dataclasses
import json

import numpy as np
import pytest

from instanas_jax import latency, latency_file, policy, search_space
from instanas_jax.errors import InputError

SPEC = search_space.preset("tiny", num_classes=10)


def make_table(**changes) -> latency.LatencyTable:
    cells_ms = np.arange(1.0, 21.0).reshape(4, 5)  # Cell 0 holds 1..5, cell 3 holds 16..20.
    table = latency.LatencyTable(
        backend="cpu",
        device={"cpu": "X", "cores": 2},
        versions={"jax": "0"},
        spec=json.loads(json.dumps(SPEC.to_json())),
        batch_size=1,
        dtype="float32",
        fixed_ms={"stem": 0.5, "head": 0.25, "controller": 0.125},
        cells_ms=cells_ms,
        settled_ms=cells_ms,
        spread_ms=np.zeros((4, 5)),
        repeats=3,
        in_network_ms=dict.fromkeys(latency.IN_NETWORK, 0.0),
    )
    return dataclasses.replace(table, **changes)


def test_lookup_charges_the_forced_op_and_nothing_for_identity():
    # The tiny preset's groups start at cells 0, 1 and 3; cell 2 may be empty.
    masks = np.zeros((3, 4, 5), np.float32)
    masks[1, 2, 0] = 1.0  # 11 ms
    masks[2, 0, :2] = 1.0  # 1 + 2 ms in place of the forced 5
    forced = 5.0 + 10.0 + 20.0
    expected = [forced, forced + 11.0, forced - 5.0 + 3.0]
    np.testing.assert_allclose(
        latency.lookup(make_table().cells_ms, masks, SPEC.forced_cells), expected
    )


def test_baselines_are_op_0_all_and_the_fastest():
    bounds = latency.baselines(make_table(), SPEC)
    assert bounds.mobilenetv2_ms == 1 + 6 + 11 + 16
    assert bounds.max_ms == sum(range(1, 21))
    assert bounds.min_ms == 1 + 6 + 16  # The fastest op of the cells that can't be empty.


def test_the_fastest_runs_what_is_settled_to_run():
    """Cell 0 runs ops 1 and 2, cell 1 may choose from op 2 on, cell 2 always runs op 4."""
    settled = policy.Settled.nothing(SPEC.mask_shape)
    settled.on[0, [1, 2]] = settled.off[1, :2] = settled.on[2, 4] = True
    bounds = latency.baselines(make_table(), SPEC, settled)
    assert bounds.min_ms == (2 + 3) + 8 + 15 + 16
    assert bounds.mobilenetv2_ms == latency.baselines(make_table(), SPEC).mobilenetv2_ms


def test_bounds_are_of_static_networks():
    in_network_ms = dict.fromkeys(latency.IN_NETWORK, 9.0)
    table = make_table(in_network_ms=in_network_ms, cells_ms=np.full((4, 5), 99.0))
    assert latency.baselines(table, SPEC) == latency.baselines(make_table(), SPEC)


def test_every_image_pays_a_call():
    table = make_table(in_network_ms=dict.fromkeys(latency.IN_NETWORK, 0.0) | {"call": 0.5})
    assert table.fixed_total_ms(controller=False) == 0.75 + 0.5


def test_fixed_parts_leave_the_controller_out_for_static_architectures():
    assert make_table().fixed_total_ms(controller=True) == 0.875
    assert make_table().fixed_total_ms(controller=False) == 0.75


def test_deciding_costs_where_something_is_left_to_decide():
    in_network_ms = dict.fromkeys(latency.IN_NETWORK, 9.0)
    in_network_ms |= {"call": 0.0, "held": 0.001, "switch": 0.01, "several": 0.1}
    table = make_table(in_network_ms=in_network_ms)
    # A path that runs without a switch takes half as long.
    table = dataclasses.replace(table, settled_ms=table.cells_ms / 2)
    mask = np.zeros((4, 5), np.float32)
    mask[0, :2] = mask[2, :3] = 1.0  # Rows 1 + 2 and 11 + 12 + 13; cells 1 and 3 are forced.
    rows = 3.0 + 36.0 + 10.0 + 20.0

    def predicted(settled) -> float:
        return float(latency.image_ms(table, mask, SPEC.forced_cells, settled))

    undecided = policy.Settled.nothing(SPEC.mask_shape)
    held = 20 * 0.001
    assert predicted(undecided) == pytest.approx(rows + (1 + 2) * 0.1 + 4 * 0.01 + held + 0.875)
    cell_0_settled = policy.Settled.nothing(SPEC.mask_shape)
    cell_0_settled.on[0, :2] = cell_0_settled.off[0, 2:] = True
    held = 15 * 0.001  # The first cell's are in its rows.
    assert predicted(cell_0_settled) == pytest.approx(
        rows - 1.5 + 2 * 0.1 + 3 * 0.01 + held + 0.875
    )
    # One path beside others that run is as dear as many: there are no two static networks.
    beside = policy.Settled(cell_0_settled.on.copy(), cell_0_settled.off.copy())
    beside.off[0, 4] = False
    assert predicted(beside) == pytest.approx(rows + (1 + 2) * 0.1 + 4 * 0.01 + 18 * 0.001 + 0.875)
    # One path or nothing: cell 1 chooses, and runs the forced op.
    chooses = policy.Settled(cell_0_settled.on.copy(), cell_0_settled.off.copy())
    chooses.off[1, 1:] = True
    assert predicted(chooses) == pytest.approx(
        rows - 1.5 - 5.0 + 2 * 0.1 + 2 * 0.01 + 9.0 + 10 * 0.001 + 0.875
    )
    # One architecture is left: neither switches nor the controller run.
    assert predicted(policy.Settled.architecture(mask)) == pytest.approx(rows / 2 + 0.75)
    static_ms = latency.static_ms(table, mask, SPEC.forced_cells)
    assert static_ms == pytest.approx(rows / 2 + 0.75)


def test_a_saved_table_loads_equal(tmp_path):
    table = make_table(in_network_ms=dict.fromkeys(latency.IN_NETWORK, 0.0) | {"path": -0.1})
    latency_file.save(table, tmp_path / "t.json")
    loaded = latency_file.load(tmp_path / "t.json", SPEC, device=table.device)
    np.testing.assert_array_equal(loaded.cells_ms, table.cells_ms)
    np.testing.assert_array_equal(loaded.settled_ms, table.settled_ms)
    assert loaded.fixed_ms == table.fixed_ms and loaded.in_network_ms == table.in_network_ms
    assert not list(tmp_path.glob("*.partial"))


def test_another_devices_table_is_refused_unless_allowed(tmp_path):
    latency_file.save(make_table(), tmp_path / "t.json")
    here = {"cpu": "Y", "cores": 8}
    with pytest.raises(InputError, match="cpu=X.*cpu=Y.*--allow_foreign_table"):
        latency_file.load(tmp_path / "t.json", SPEC, device=here)
    latency_file.load(tmp_path / "t.json", SPEC, device=here, allow_foreign=True)


def test_another_supernets_table_is_an_error_naming_both(tmp_path):
    latency_file.save(make_table(), tmp_path / "t.json")
    other = search_space.preset("tiny", num_classes=10, stem_stride=1)
    with pytest.raises(InputError, match="stem_stride is 2 there, 1 here"):
        latency_file.load(tmp_path / "t.json", other)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 9),
        ("cells_ms", [[1.0]]),
        ("cells_ms", "fast"),
        ("settled_ms", [[1.0]]),
        ("fixed_ms", {"stem": 1.0}),
        ("in_network_ms", {"switch": 0.0}),
        ("in_network_ms", dict.fromkeys(latency.IN_NETWORK, 0.0) | {"call": -1.0}),
        ("in_network_ms", dict.fromkeys(latency.IN_NETWORK, 0.0) | {"path": float("nan")}),
        ("fixed_ms", {"stem": -1.0, "head": 1.0, "controller": 1.0}),
        ("in_network_ms", dict.fromkeys(latency.IN_NETWORK, 0.0) | {"call": None}),
        ("in_network_ms", [[name, "slow"] for name in latency.IN_NETWORK]),
        ("fixed_ms", {"stem": "fast", "head": 1.0, "controller": 1.0}),
        ("fixed_ms", ["stem", "head", "controller"]),
        ("spec", 3),
        ("spec", {"ops": ["a"], "groups": [[1]]}),
        ("device", "x"),
        ("device", None),
        ("batch_size", 5),
        ("unknown", 1),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, field, value):
    path = tmp_path / "t.json"
    latency_file.save(make_table(), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(InputError) as error:
        latency_file.load(path, SPEC)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_no_file_and_no_json_are_one_line(tmp_path):
    with pytest.raises(InputError, match="experiments.profile"):
        latency_file.load(tmp_path / "absent.json", SPEC)
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        latency_file.load(tmp_path / "t.json", SPEC)
