"""The published supernets' shapes and costs, and what a user can ask for."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instanas_jax import search_space
from instanas_jax.errors import InputError

PUBLISHED = ("px32", "px64", "px224")
FORCED_CELLS = [0, 1, 3, 6, 10, 13, 16]  # The first cell of each of the seven groups.


class TestCells:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_seventeen_cells_walk_through_the_published_channels(self, name):
        spec = search_space.preset(name, num_classes=10)
        assert spec.num_cells == len(spec.cells) == 17
        assert spec.mask_shape == (17, 5)
        outs = [16] + [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3 + [320]
        assert [cell.out_channels for cell in spec.cells] == outs
        assert [cell.in_channels for cell in spec.cells] == [32, *outs[:-1]]
        assert np.flatnonzero(spec.forced_cells).tolist() == FORCED_CELLS

    @pytest.mark.parametrize(
        ("name", "sizes"),
        [
            # The stem keeps the image's 32 pixels; groups 3, 4 and 6 halve them.
            ("px32", [32] * 4 + [16] * 3 + [8] * 7 + [4] * 3),
            # Group 2 halves as well.
            ("px64", [64] * 2 + [32] * 2 + [16] * 3 + [8] * 7 + [4] * 3),
            # The stem halves 224 to 112, and group 2 as in px64.
            ("px224", [112] * 2 + [56] * 2 + [28] * 3 + [14] * 7 + [7] * 3),
        ],
    )
    def test_input_sizes(self, name, sizes):
        spec = search_space.preset(name, num_classes=10)
        assert [cell.in_size for cell in spec.cells] == sizes
        assert [cell.out_size for cell in spec.cells] == [*sizes[1:], sizes[-1]]

    def test_residuals_are_where_the_shape_stays(self):
        spec = search_space.preset("px32", num_classes=10)
        with_residual = {index for index, cell in enumerate(spec.cells) if cell.has_residual}
        assert with_residual == set(range(17)) - set(FORCED_CELLS)

    def test_a_first_cell_may_have_a_residual_and_still_forces_an_op(self):
        first = search_space.preset("tiny", num_classes=10).cells[0]  # 8 to 8 channels, stride 1.
        assert first.has_residual and first.forces_op

    def test_odd_sizes_round_up(self):
        cell = search_space.CellSpec(8, 8, stride=2, in_size=7, forces_op=True)
        assert cell.out_size == 4  # Windows centred on pixels 0, 2, 4, 6.

    def test_stem_stride_halves_every_cell(self):
        spec = search_space.preset("px32", num_classes=10, stem_stride=2)
        assert [cell.in_size for cell in spec.cells] == [16] * 4 + [8] * 3 + [4] * 7 + [2] * 3


def test_what_is_asked_for_replaces_the_presets():
    spec = search_space.preset(
        "px32",
        num_classes=7,
        width=0.5,
        stem_stride=2,
        join="mean",
        head_channels=320,
        controller_channels=8,
        controller_pool=4,
    )
    assert (spec.num_classes, spec.stem_stride, spec.join) == (7, 2, "mean")
    assert (spec.head_channels, spec.controller_channels, spec.controller_pool) == (320, 8, 4)


class TestWidth:
    @pytest.mark.parametrize(
        ("width", "stem", "groups", "head"),
        [
            # 12 is as near to 8 as to 16 and goes up; the head does not shrink under 1280.
            (0.5, 16, [8, 16, 16, 32, 48, 80, 160], 1280),
            # 11.2 would go to 8, more than 10 % down, so 16; 16.8 to 16, 44.8 to 48, 67.2 to 64.
            (0.7, 24, [16, 16, 24, 48, 64, 112, 224], 1280),
            # 22.4 to 24, 33.6 to 32, 44.8 to 48, 89.6 to 88, 134.4 to 136; 1280 x 1.4 = 1792.
            (1.4, 48, [24, 32, 48, 88, 136, 224, 448], 1792),
        ],
    )
    def test_rounding_by_hand(self, width, stem, groups, head):
        spec = search_space.preset("px32", num_classes=10, width=width)
        assert spec.stem_channels == stem
        assert [group.channels for group in spec.groups] == groups
        assert spec.head_channels == head
        assert spec.controller_channels == 16

    @given(st.floats(0.1, 4.0))
    def test_channels_are_multiples_of_eight_close_to_the_wish(self, width):
        base = search_space.preset("px32", num_classes=10)
        spec = search_space.preset("px32", num_classes=10, width=width)
        for before, after in zip(base.groups, spec.groups, strict=True):
            wished = before.channels * width
            assert after.channels % 8 == 0 and after.channels >= 8
            assert after.channels >= 0.9 * wished
            assert after.channels <= max(8, wished + 8)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "value"),
        [
            ({"name": "px33", "num_classes": 10}, "px33"),
            ({"name": "px32", "num_classes": 1}, "num_classes=1"),
            ({"name": "px32", "num_classes": 10, "width": 0.05}, "width=0.05"),
            ({"name": "px32", "num_classes": 10, "width": float("nan")}, "width=nan"),
            ({"name": "px32", "num_classes": 10, "width": 4.5}, "width=4.5"),
            ({"name": "px32", "num_classes": 10, "stem_stride": 3}, "stem_stride=3"),
            ({"name": "px32", "num_classes": 10, "stem_stride": 0}, "stem_stride=0"),
            ({"name": "px32", "num_classes": 10, "head_channels": -1}, "head_channels=-1"),
            ({"name": "px32", "num_classes": 10, "controller_pool": 3}, "controller_pool=3"),
        ],
    )
    def test_wrong_ones_are_named_with_their_value(self, arguments, value):
        with pytest.raises(InputError) as error:
            search_space.preset(**arguments)
        assert value in str(error.value) and "\n" not in str(error.value)

    def test_op_index(self):
        names = ["mbconv_k3_e6", "mbconv_k3_e3", "mbconv_k5_e6", "mbconv_k5_e3", "basic_conv"]
        assert [search_space.op_index(name) for name in names] == [0, 1, 2, 3, 4]
        with pytest.raises(InputError, match="mbconv_k7_e6.*basic_conv"):
            search_space.op_index("mbconv_k7_e6")

    def test_the_forced_op_is_basic_conv_and_mobilenetv2s_is_its_bottleneck(self):
        assert search_space.op_index("basic_conv") == search_space.FORCED_OP
        assert search_space.op_index("mbconv_k3_e6") == search_space.MOBILENETV2_OP


class TestJson:
    @pytest.mark.parametrize("name", search_space.PRESETS)
    def test_round_trip_changes_nothing(self, name):
        values = search_space.preset(name, num_classes=10).to_json()
        assert json.loads(json.dumps(values)) == values

    def test_every_field_counts(self):
        spec = search_space.preset("px32", num_classes=10)
        others = [
            dataclasses.replace(spec, num_classes=11),
            dataclasses.replace(spec, stem_stride=2),
            dataclasses.replace(spec, head_dropout=0.5),
            dataclasses.replace(spec, groups=spec.groups[:-1]),
        ]
        assert all(other.to_json() != spec.to_json() for other in others)


def test_uniform_architecture_runs_one_op_everywhere():
    spec = search_space.preset("tiny", num_classes=10)
    np.testing.assert_array_equal(
        search_space.uniform_architecture(spec, 2), [[0.0, 0.0, 1.0, 0.0, 0.0]] * 4
    )
