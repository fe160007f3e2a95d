"""The published supernets' shapes and costs, and what a user can ask for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instanas_jax import search_space, supernet
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


class TestCosts:
    def test_cost_of_an_mbconv_by_hand(self):
        cell = search_space.CellSpec(2, 3, stride=2, in_size=4, forces_op=True)
        # Hidden 6 x 2 = 12. Expansion 2 x 12 = 24 weights at 4 x 4; depthwise 9 x 12 = 108 and
        # projection 12 x 3 = 36 at 2 x 2. Two parameters for each of 12 + 12 + 3 channels.
        cost = search_space.op_cost(cell, search_space.CANDIDATE_OPS[0])
        assert cost.flops == 2 * (24 * 16 + 108 * 4 + 36 * 4)
        assert cost.params == 24 + 108 + 36 + 2 * 27

    def test_cost_of_a_basic_conv_by_hand(self):
        cell = search_space.CellSpec(2, 3, stride=2, in_size=4, forces_op=True)
        # 9 x 2 x 3 = 54 and 9 x 3 x 3 = 81 weights, both at 2 x 2; 2 x (3 + 3) for batch norm.
        cost = search_space.op_cost(cell, search_space.CANDIDATE_OPS[4])
        assert cost.flops == 2 * (54 + 81) * 4
        assert cost.params == 54 + 81 + 12

    def test_published_size_is_the_networks_size(self):
        """9.688 M parameters and 0.861 GFLOP with 100 classes at 32 pixels: what the tables add
        up to, and what is counted in the network's own arrays and convolutions."""
        spec = search_space.preset("px32", num_classes=100)
        flops, params = search_space.cost_table(spec)
        fixed = search_space.fixed_cost(spec)
        assert flops.shape == params.shape == (17, 5)
        assert params.sum() + fixed.params == 9_688_260
        assert flops.sum() + fixed.flops == pytest.approx(0.861e9, rel=1e-3)

        variables = supernet.init(jax.random.key(0), spec)
        assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 9_688_260

        program = jax.make_jaxpr(
            lambda *inputs: supernet.apply_eval(spec, *inputs, lowering="native")
        )(
            jax.eval_shape(supernet.fold, variables),
            jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
            jax.ShapeDtypeStruct((1, 17, 5), jnp.float32),
        )
        # Each of a convolution's outputs takes as many multiply-adds as a filter has weights.
        convolutions = sum(
            2 * equation.outvars[0].aval.size * int(np.prod(equation.invars[1].aval.shape[:-1]))
            for equation in program.eqns
            if equation.primitive.name == "conv_general_dilated"
        )
        classifier = 2 * 1280 * 100
        assert convolutions + classifier == flops.sum() + fixed.flops

    def test_mobilenetv2_at_224_pixels_costs_its_published_multiply_adds(self):
        """About 0.43 G: 0.3 G in MobileNetV2's paper, whose first group expands by 1, not 6."""
        spec = search_space.preset("px224", num_classes=1000)
        flops, _ = search_space.cost_table(spec)
        fixed = search_space.fixed_cost(spec)
        published = flops[1:, search_space.MOBILENETV2_OP].sum() + fixed.flops
        # MobileNetV2's first block: depthwise 3x3 on 32 channels, projection to 16, at 112 x 112.
        published += 2 * (9 * 32 + 32 * 16) * 112 * 112
        assert published / 2 == pytest.approx(300e6, rel=0.03)


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
