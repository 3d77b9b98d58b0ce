"""Recipes: which combinations there are, and the scales they give."""

import math

import attrs
import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.random_bits import stream_key_tensor, uniform
from altgrad_core.recipe import Recipe, flow_recipe, recipe_of

LOPSIDED = Format(name="LOPSIDED", bits=3, values=[-1.0, -0.5, 0.0, 0.5, 1.0, 3.0])


@pytest.fixture
def e4m3(table):
    return table("E4M3")


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"granularity": "row"}, "granularity='row' is not one of 'none', 'tensor', 'channel', 'block'"),
        ({"block": 64}, "block=64 is not one of 16, 32"),
        ({"scale_rule": "max"}, "scale_rule='max' is not one of 'fit', 'ocp', 'exact'"),
        ({"scale_mode": "adaptive"}, "scale_mode='adaptive' is not one of 'current', 'initial', 'delayed'"),
        ({"rounding": "floor"}, "rounding='floor' is not one of 'nearest_even'"),
        ({"overflow": "wrap"}, "overflow='wrap' is not one of 'saturate', 'ieee'"),
        ({"clip_gradient": 1}, "clip_gradient=1 is not one of True, False"),
        ({"margin": 0.0}, "margin is head room, a positive number"),
        ({"margin": math.inf}, "margin is head room"),
        ({"margin": "2"}, "margin is head room, a positive number that multiplies amax, not '2'"),
        ({"margin": True}, "margin is head room"),
        ({"amax": -1.0}, "amax is a magnitude"),
        ({"amax": "1"}, "amax is a magnitude"),
        ({"amax_history": True}, "amax_history is how many steps"),
        ({"amax_history": 0}, "amax_history is how many steps"),
    ],
)
def test_a_value_that_is_no_choice_is_refused(e4m3, options, reason):
    with pytest.raises(ValueError, match=reason):
        Recipe(format=e4m3, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"scale_mode": "delayed", "granularity": "channel"},
            'scale_mode: "delayed" needs granularity = "ten',
        ),
        ({"scale_mode": "static", "amax": 1.0, "granularity": "none"}, 'scale_mode: "static" needs granular'),
        ({"scale_mode": "static"}, 'amax: is missing: scale_mode = "static" needs the magnitude'),
        ({"amax": 1.0}, 'amax: goes with scale_mode = "static", not "current"'),
        ({"block_scale": LOPSIDED}, 'block_scale: "LOPSIDED" needs granularity = "block", not "tensor"'),
        (
            {"block_scale": LOPSIDED, "granularity": "block", "scale_rule": "ocp"},
            'scale_rule: "ocp" does not go with block_scale',
        ),
        ({"margin": 2.0, "scale_rule": "ocp"}, 'margin: 2 has no effect under scale_rule = "ocp"'),
        (
            {"margin": 2.0, "granularity": "block", "block_scale": LOPSIDED},
            "margin: 2 has no effect under block_scale",
        ),
    ],
)
def test_options_that_contradict_one_another_are_refused_with_the_way_out(e4m3, options, reason):
    with pytest.raises(ValueError, match=reason):
        Recipe(format=e4m3, **options)


def test_an_option_that_there_is_not_is_named_with_the_nearest(e4m3):
    with pytest.raises(
        ValueError, match="'granularty' is no option of a quantized tensor; did you mean 'gran"
    ):
        recipe_of(e4m3, {"granularty": "block"})
    with pytest.raises(ValueError, match="'xyz' is no option of a quantized tensor; there are format, gran"):
        flow_recipe({"format": e4m3, "xyz": 1})


def test_a_recipe_needs_a_format():
    with pytest.raises(ValueError, match="leave it alone"):
        Recipe(format="FP32")


# --- the shape and the value of scales ------------------------------------------------------------------


X = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])  # E4M3: 448 = 1.75 * 2^8


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 2.0**7),  # 448/2 = 224
        ({"granularity": "none"}, 1.0),
        ({"granularity": "channel"}, [[2.0**7], [2.0**8]]),  # zeros: as if amax were 1
        ({"granularity": "block"}, [[2.0**7] * 3, [2.0**8] * 3]),
        ({"scale_rule": "ocp"}, 2.0**7),
        ({"scale_rule": "exact"}, 224.0),
        ({"scale_rule": "exact", "margin": 2.0}, 112.0),
        ({"scale_rule": "exact", "granularity": "channel"}, [[224.0], [256.0]]),
        ({"margin": 1.0001}, 2.0**7),
        ({"margin": 2.0}, 2.0**6),
        ({"scale_mode": "static", "amax": 8.0}, 2.0**5),
        ({"scale_mode": "static", "amax": 8.0, "scale_rule": "exact"}, 56.0),
    ],
)
def test_scales_by_hand(e4m3, options, scale):
    found = Recipe(format=e4m3, **options).scale_of(X)
    assert found.dtype == torch.float32
    assert found.tolist() == scale


def test_ocp_is_up_to_twice_fit_and_saturates_there(e4m3):
    x = torch.tensor([1.9, 1.0])
    fit, ocp = (Recipe(format=e4m3, scale_rule=rule) for rule in ("fit", "ocp"))
    assert (fit.scale_of(x).item(), ocp.scale_of(x).item()) == (2.0**7, 2.0**8)
    assert ocp.quantize(x, ocp.scale_of(x)).tolist() == [1.75, 1.0]


def test_an_amax_from_elsewhere_takes_the_place_of_the_tensors_own(e4m3):
    assert Recipe(format=e4m3).scale_of(X, torch.tensor(16.0)).item() == 2.0**4


def test_formats_as_wide_as_real_tensors_are_never_scaled(table):
    for name in ("BF16", "FP16"):
        for granularity in ("tensor", "channel", "block"):
            assert Recipe(format=table(name), granularity=granularity).scale_of(X).item() == 1


@pytest.mark.parametrize("rule", ["fit", "ocp", "exact"])
@pytest.mark.parametrize("amax", [2.0**-149, 1e-30, 1.0, 3e38])
def test_at_the_ends_of_float32_every_format_gives_what_float64_gives(table, named, rule, amax):
    x = torch.tensor([amax, -amax, amax / 2, 0.0])
    for name in named:
        recipe = Recipe(format=table(name), scale_rule=rule)
        scale = recipe.scale_of(x)
        assert 2.0**-126 <= scale.item() <= 2.0**126
        exact = recipe.format.quantize((x * scale).double()) / scale.double()  # 2^128 rounds to inf below
        assert torch.equal(recipe.quantize(x, scale), exact.float()), name
        assert exact[3] == 0
        if recipe.scaled and 2.0**-125 < scale.item() < 2.0**125:  # not clamped
            assert 0.5 <= (exact[0] / x[0]).item() <= 1.5, name


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 40)])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_a_tensor_without_elements_has_a_scale(e4m3, shape, granularity):
    recipe = Recipe(format=e4m3, granularity=granularity)
    x = torch.empty(shape)
    assert recipe.quantize(x, recipe.scale_of(x)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["none", "tensor", "channel", "block"])
def test_the_result_has_the_inputs_dtype_and_powers_of_two_are_exact_in_each(table, granularity, dtype):
    x = (torch.arange(-60, 60).reshape(2, 60) / 64).to(dtype)
    recipe = Recipe(format=table("E3M4"), granularity=granularity)
    found = recipe.quantize(x, recipe.scale_of(x))
    assert found.dtype == dtype
    assert torch.equal(found.double(), recipe.quantize(x.double(), recipe.scale_of(x)))


def test_the_layout_in_memory_does_not_matter(e4m3):
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    for granularity in ("tensor", "channel", "block"):
        recipe = Recipe(format=e4m3, granularity=granularity, rounding="stochastic")
        keys = stream_key_tensor((1, 2, 3))
        strided, dense = x.t(), x.t().contiguous()
        assert torch.equal(
            recipe.quantize(strided, recipe.scale_of(strided), keys),
            recipe.quantize(dense, recipe.scale_of(dense), keys),
        )


def test_stochastic_rounding_takes_the_numbers_of_its_stream(e4m3):
    recipe = Recipe(format=e4m3, rounding="stochastic", granularity="none")
    x = torch.full((4, 5), 1 + 1 / 16)  # half way between 1 and 1.125
    found = recipe.quantize(x, recipe.scale_of(x), stream_key_tensor((1, 2, 3)))
    assert torch.equal(found == 1.125, uniform((1, 2, 3), (4, 5)) < 0.5)


def passing(recipe, x, keys=None):
    return recipe.passes(torch.tensor(x), torch.ones(()), keys).tolist()


def test_a_gradient_passes_where_nothing_rounds_past_the_formats_own_ends():
    recipe = Recipe(format=LOPSIDED, granularity="none", clip_gradient=True)  # next: -1.5 and 5
    # ties at the ends go to the even rung: -1 is rung -2, and 3 is rung 3
    assert passing(recipe, [-1.26, -1.25, 0.0, 3.0, 3.99, 4.0]) == [False, True, True, True, True, False]
    x = torch.ones(1)
    assert attrs.evolve(recipe, clip_gradient=False).passes(x, recipe.scale_of(x)) is None


def test_what_rounds_to_the_largest_value_keeps_its_gradient_as_does_nan(e4m3):
    recipe = Recipe(format=e4m3, granularity="none", clip_gradient=True)
    x = [450.0, 464.0, 464.1, -464.1, math.inf, -math.inf, math.nan]
    assert passing(recipe, x) == [True, True, False, False, False, False, True]


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("toward_zero", [False, True, True, False]),
        ("up", [False, True, False, False]),
        ("down", [False, False, True, False]),
    ],
)
def test_what_is_rounded_inward_saturates_from_the_value_after_the_end(e4m3, rounding, expected):
    recipe = Recipe(format=e4m3, granularity="none", clip_gradient=True, rounding=rounding)
    assert passing(recipe, [-480.0, -479.0, 479.0, 480.0]) == expected


def test_stochastic_rounding_saturates_where_it_went_past_the_end(e4m3):
    recipe = Recipe(format=e4m3, granularity="none", clip_gradient=True, rounding="stochastic")
    keys = stream_key_tensor((3, 0, 0))
    went_up = uniform((3, 0, 0), 1000) < 0.25  # 456 is a quarter of the way from 448 to 480
    assert passing(recipe, [456.0] * 1000, keys) == (~went_up).tolist()
    assert 200 < went_up.sum() < 300


def test_half_precision_does_not_overflow_while_it_is_asked_where_a_gradient_passes(table):
    recipe = Recipe(format=table("E5M2"), clip_gradient=True)
    x = torch.tensor([65504.0, 1.0], dtype=torch.float16)
    assert recipe.passes(x, recipe.scale_of(x)).tolist() == [True, True]


@pytest.mark.parametrize("granularity", ["none", "tensor", "channel", "block"])
def test_a_number_by_itself_is_one_block_of_one_channel(e4m3, granularity):
    recipe, x = Recipe(format=e4m3, granularity=granularity), torch.tensor(0.3)
    scale = recipe.scale_of(x)
    assert scale.shape == ()
    assert recipe.quantize(x, scale).item() == 0.3125


# --- recipes of flows ---------------------------------------------------------------------------------


def test_a_flow_by_format_has_a_delayed_scale(e4m3):
    assert flow_recipe(e4m3) == Recipe(format=e4m3, scale_mode="delayed")
    assert flow_recipe({"format": e4m3, "margin": 2.0}).scale_mode == "delayed"
    assert flow_recipe({"format": e4m3, "granularity": "channel"}).scale_mode == "current"
    assert flow_recipe(Recipe(format=e4m3)).scale_mode == "current"


@pytest.mark.parametrize("nothing", [None, "FP32", "none", {"format": "none", "margin": 2.0}])
def test_a_flow_may_be_left_alone(nothing):
    assert flow_recipe(nothing) is None


def test_a_format_by_itself_takes_the_other_options_from_the_default(table, e4m3):
    default = Recipe(format=e4m3, granularity="channel")
    assert flow_recipe(table("E5M2"), default) == Recipe(format=table("E5M2"), granularity="channel")
    assert flow_recipe({"format": e4m3, "margin": 2.0}, default).granularity == "tensor"
