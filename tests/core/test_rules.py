"""Which Linear gets which format and lives where, from names alone."""

import attrs
import pytest

from altgrad_core.options import FieldError, FormatChoice
from altgrad_core.quantize_options import ActivationOptions, GradientOptions, QuantizeOptions, RuleOptions
from altgrad_core.rules import LayerPlan, Rule, bits, covered, first_match, geometries, no_match, plan
from altgrad_core.structuring import structure

LAYERS = ("transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", "lm_head")
TIED = ("lm_head",)
ATTENTION, MLP, HEAD = LAYERS
E5M2, E3M4, BF16 = FormatChoice("E5M2"), FormatChoice("E3M4"), FormatChoice("BF16")


def planned(registry, *rules, tied=(), storage="master"):
    """Return the plan for [quantize] format E5M2 with these rules, given as keyword arguments."""
    options = tuple(RuleOptions(**rule) for rule in rules)
    quantize = QuantizeOptions(format=E5M2, storage=storage, rule=options)
    return plan(quantize, LAYERS, tied, registry)


def test_without_rules_every_layer_gets_the_format_and_storage(registry):
    assert planned(registry, storage="grid") == dict.fromkeys(LAYERS, LayerPlan(E5M2, "grid"))


def test_a_tied_head_is_left_alone_unless_a_rule_names_it(registry):
    assert list(planned(registry, tied=TIED)) == [ATTENTION, MLP]
    named = planned(registry, {"layers": "lm_head"}, tied=TIED, storage="grid")
    assert named[HEAD] == LayerPlan(E5M2, "master", covered=False)


def test_the_first_rule_that_matches_wins(registry):
    found = planned(registry, {"layers": ".*attn.*", "format": E3M4}, {"layers": ".*", "format": BF16})
    assert [found[layer].format for layer in LAYERS] == [E3M4, BF16, BF16]


def test_a_rule_matches_whole_names_only():
    rules = [RuleOptions(layers="c_proj"), RuleOptions(layers=r".*\.mlp\.c_proj")]
    assert [first_match(rules, layer) for layer in LAYERS] == [None, 1, None]
    for made in (RuleOptions, Rule):
        assert made(layers="lm_.*").matches(HEAD)
        assert not made(layers="lm_").matches(HEAD)


def test_a_rule_without_format_keeps_that_of_quantize(registry):
    found = planned(registry, {"layers": ".*mlp.*", "storage": "grid"})
    assert found[MLP] == LayerPlan(E5M2, "grid")
    assert found[ATTENTION] == LayerPlan(E5M2, "master")


@pytest.mark.parametrize("format", ["FP32", "none"])
def test_a_layer_without_format_is_not_planned(registry, format):
    assert MLP not in planned(registry, {"layers": ".*mlp.*", "format": FormatChoice(format)})


@pytest.mark.parametrize("format", ["E5M2", "BF16", "FP32", "none"])
def test_what_takes_the_format_of_quantize_is_covered_whatever_it_is(registry, format):
    quantize = QuantizeOptions(format=FormatChoice(format), rule=(RuleOptions(layers=".*mlp.*"),))
    assert covered(quantize, LAYERS, TIED, registry) == [ATTENTION, MLP]
    assert covered(quantize, LAYERS, (), registry) == list(LAYERS)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"format": E3M4}, True),
        ({"format": BF16}, False),
        ({"format": BF16, "storage": "master"}, True),
        ({"format": FormatChoice("FP32")}, False),
        ({"format": FormatChoice("FP32"), "storage": "master"}, False),
        ({"storage": "grid"}, True),
    ],
)
def test_a_rule_covers_its_layers_unless_it_takes_them_out(registry, rule, expected):
    quantize = QuantizeOptions(format=FormatChoice("FP32"), rule=(RuleOptions(layers="lm_head", **rule),))
    assert (HEAD in covered(quantize, LAYERS, (), registry)) == expected
    assert HEAD not in covered(quantize, LAYERS, TIED, registry), "a tied head is an embedding too"


def test_a_rule_may_say_whose_geometry_weights_without_a_format_take():
    of = RuleOptions(layers=".*mlp.*", of_format=E3M4)
    quantize = QuantizeOptions(format=FormatChoice("FP32"), rule=(RuleOptions(layers=ATTENTION), of))
    assert geometries(quantize, LAYERS) == {MLP: E3M4}
    assert list(quantize.conflicts()) == []
    for format, own in ((E5M2, None), (FormatChoice("FP32"), FormatChoice("FP32"))):
        refused = QuantizeOptions(format=format, rule=(attrs.evolve(of, format=own),))
        (problem,) = refused.conflicts()
        assert (problem.path, str(problem)) == (
            ("rule", 0, "of_format"),
            'is the geometry of weights that take quantize.format = "FP32"; leave it out',
        )


def test_flows_are_those_of_their_tables_unless_a_rule_says_otherwise(registry):
    rules = (
        RuleOptions(layers=".*mlp.*", activations=E3M4, gradients=FormatChoice("FP32")),
        RuleOptions(layers="lm_head", format=FormatChoice("FP32")),
    )
    flows = {"activations": ActivationOptions(format=E5M2), "gradients": GradientOptions(format=BF16)}
    found = plan(QuantizeOptions(format=E5M2, rule=rules, **flows), LAYERS, TIED, registry)
    assert found[ATTENTION] == LayerPlan(E5M2, "master", activations=E5M2, gradients=BF16)
    assert found[MLP] == LayerPlan(E5M2, "master", activations=E3M4)
    assert found[HEAD] == LayerPlan(FormatChoice("FP32"), "master", False, E5M2, BF16)


def test_grid_storage_of_an_unquantized_weight_means_master(registry):
    quantize = QuantizeOptions(
        format=FormatChoice("FP32"), storage="grid", activations=ActivationOptions(format=E5M2)
    )
    assert {one.storage for one in plan(quantize, LAYERS, (), registry).values()} == {"master"}


def test_a_layer_without_any_format_is_not_planned(registry):
    quantize = QuantizeOptions(
        format=FormatChoice("FP32"), rule=(RuleOptions(layers=".*", activations=E5M2),)
    )
    assert list(plan(quantize, LAYERS, (), registry)) == list(LAYERS)
    assert plan(attrs.evolve(quantize, rule=()), LAYERS, (), registry) == {}


def test_a_wide_format_in_a_rule_is_master_and_no_geometry_unless_asked(registry):
    wide = {"layers": ".*mlp.*", "format": BF16}
    assert planned(registry, wide, storage="grid")[MLP] == LayerPlan(BF16, "master", covered=False)
    assert planned(registry, {**wide, "storage": "grid"})[MLP] == LayerPlan(BF16, "grid")


@pytest.mark.parametrize(
    ("spec", "width"),
    [
        ("E5M2", 8),
        ("BF16", 16),
        ("none", 32),
        ({"exponent_bits": 8, "mantissa_bits": 7}, 16),
        ({"exponent_bits": 2, "mantissa_bits": 1}, 4),
    ],
)
def test_the_width_of_a_format_is_known_without_building_it(registry, spec, width):
    format, problems = structure(spec, FormatChoice, registry)
    assert not problems
    assert bits(format, registry) == width


def test_a_format_of_unknown_width_is_taken_as_narrow(registry, registered):
    wider = attrs.evolve(registry, registered=(*registry.registered, registered("format", "Posit")))
    assert bits(FormatChoice("Posit"), wider) == 8


@pytest.mark.parametrize(
    ("rules", "tied", "path", "message"),
    [
        (
            [{"layers": "x"}],
            (),
            ("rule", 0, "layers"),
            "'x' matches no layer; there are: transformer.h.N.attn",
        ),
        ([{"layers": ".*"}, {"layers": ".*mlp.*"}], (), ("rule", 1, "layers"), "is never reached"),
        ([{"layers": "lm_head", "storage": "grid"}], TIED, ("rule", 0, "storage"), "shares its weight"),
    ],
)
def test_a_rule_that_cannot_be_raises_where_it_is_written(registry, rules, tied, path, message):
    with pytest.raises(FieldError, match=message) as caught:
        planned(registry, *rules, tied=tied)
    assert caught.value.path == path


def test_names_that_differ_by_a_number_are_listed_once():
    names = [f"transformer.h.{block}.mlp" for block in range(50)]
    assert no_match("x", names, "layer") == "'x' matches no layer; there are: transformer.h.N.mlp"
