"""Costs by hand, as published, and as counted in the networks' own programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instanas_jax import cost, search_space, supernet


def test_cost_of_an_mbconv_by_hand():
    cell = search_space.CellSpec(2, 3, stride=2, in_size=4, forces_op=True)
    # Hidden 6 x 2 = 12. Expansion 2 x 12 = 24 weights at 4 x 4; depthwise 9 x 12 = 108 and
    # projection 12 x 3 = 36 at 2 x 2. Two parameters for each of 12 + 12 + 3 channels.
    path = cost.op_cost(cell, search_space.CANDIDATE_OPS[0])
    assert path.flops == 2 * (24 * 16 + 108 * 4 + 36 * 4)
    assert path.params == 24 + 108 + 36 + 2 * 27


def test_cost_of_a_basic_conv_by_hand():
    cell = search_space.CellSpec(2, 3, stride=2, in_size=4, forces_op=True)
    # 9 x 2 x 3 = 54 and 9 x 3 x 3 = 81 weights, both at 2 x 2; 2 x (3 + 3) for batch norm.
    path = cost.op_cost(cell, search_space.CANDIDATE_OPS[4])
    assert path.flops == 2 * (54 + 81) * 4
    assert path.params == 54 + 81 + 12


def test_published_size_is_the_networks_size():
    """9.688 M parameters and 0.861 GFLOP with 100 classes at 32 pixels: what the tables add
    up to, and what is counted in the network's own arrays and convolutions."""
    spec = search_space.preset("px32", num_classes=100)
    flops, params = cost.path_costs(spec)
    fixed = cost.fixed_cost(spec)
    assert flops.shape == params.shape == (17, 5)
    assert params.sum() + fixed.params == 9_688_260
    assert flops.sum() + fixed.flops == pytest.approx(0.861e9, rel=1e-3)

    variables = supernet.init(jax.random.key(0), spec)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 9_688_260

    program = jax.make_jaxpr(lambda *inputs: supernet.apply_eval(spec, *inputs, lowering="native"))(
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


def test_mobilenetv2_at_224_pixels_costs_its_published_multiply_adds():
    """About 0.43 G: 0.3 G in MobileNetV2's paper, whose first group expands by 1, not 6."""
    spec = search_space.preset("px224", num_classes=1000)
    flops, _ = cost.path_costs(spec)
    fixed = cost.fixed_cost(spec)
    published = flops[1:, search_space.MOBILENETV2_OP].sum() + fixed.flops
    # MobileNetV2's first block: depthwise 3x3 on 32 channels, projection to 16, at 112 x 112.
    published += 2 * (9 * 32 + 32 * 16) * 112 * 112
    assert published / 2 == pytest.approx(300e6, rel=0.03)
