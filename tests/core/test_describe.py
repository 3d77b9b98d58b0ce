"""What `--check` and the header of a run say of formats and scales."""

from pathlib import Path

import attrs
import pytest

from altgrad_core.check_page import check
from altgrad_core.describe import rows, share_on_grid, shown
from altgrad_core.options import FallbackChoice


def said(experiment, registry, text):
    """Return the rows of a file by name."""
    return dict(rows(experiment('name = "e"\n' + text), registry))


def test_weights_activations_and_gradients_have_a_row_each(experiment, registry):
    found = said(
        experiment,
        registry,
        """
        [quantize]
        format = "E5M2"
        [quantize.activations]
        format = "E3M4"
        [quantize.gradients]
        format = "E5M2"
        granularity = "block"
        block = 16
        scale_rule = "ocp"
        rounding = "stochastic"
        [[quantize.rule]]
        layers = 'lm_head'
        format = "BF16"
        gradients = "none"
        """,
    )
    assert found["format"] == "E5M2 stored as master (24 layers), BF16 stored as master (1 layer)"
    assert found["activations"] == "E3M4 (25 layers), scale delayed over 16 steps"
    assert found["gradients"] == (
        "E5M2 (24 layers), one scale per block of 16 (ocp), scale current, rounded stochastic"
    )


def test_what_is_left_alone_has_no_row(experiment, registry):
    found = said(experiment, registry, 'quantize.format = "E5M2"')
    assert "activations" not in found
    assert "gradients" not in found
    assert said(experiment, registry, "")["format"] == "FP32: nothing is quantized"


def test_scales_of_blocks_in_a_format_of_their_own_are_named(experiment, registry):
    text = 'train.dtype = "float32"\n'
    text += 'quantize = {format = "E5M2", granularity = "block", block_scale = "E3M4"}'
    assert said(experiment, registry, text)["format"] == (
        "E5M2 stored as master (24 layers), one scale per block of 32 (in E3M4)"
    )


def test_activations_alone_put_nothing_on_a_grid(experiment, registry):
    text = 'quantize = {format = "none", storage = "grid", activations = {format = "E5M2"}}'
    assert said(experiment, registry, text)["format"] == "FP32: no weight is quantized"
    assert said(experiment, registry, text)["activations"].startswith("E5M2 (24 layers)")
    assert share_on_grid(experiment(f'name = "e"\n{text}'), registry) == 0


def test_the_format_of_the_residuals_is_named_unless_it_is_the_weights_own(experiment, registry):
    text = 'quantize = {{format = "E5M2", storage = "grid", storage_rounding = "error_feedback"{}}}'
    own = "E5M2 stored as grid (24 layers), rounded error_feedback"
    assert said(experiment, registry, text.format(""))["format"] == own
    other = said(experiment, registry, text.format(', residual_format = "E3M4"'))["format"]
    assert other == f"{own} in E3M4"


def test_a_format_that_is_never_scaled_has_no_rule_of_scales(experiment, registry):
    text = 'quantize = {format = "BF16", scale_rule = "exact"}'
    assert said(experiment, registry, text)["format"] == "BF16 stored as master (24 layers)"


def idle(experiment, registry, options):
    """Return what the header says has no effect."""
    text = f'name = "e"\nquantize = {{format = "E5M2", {options}}}'
    return [value for name, value in rows(experiment(text), registry) if name == "no effect"]


ON_GRID = "weights on the grid are used as they are; storage_rounding rounds them"
FLOW = 'activations = {format = "E3M4", %s}'


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ('storage = "grid", rounding = "up"', f'quantize.rounding = "up": {ON_GRID}'),
        ('storage = "grid", overflow = "ieee"', f'quantize.overflow = "ieee": {ON_GRID}'),
        (
            'storage_rounding = "eco"',
            'quantize.storage_rounding = "eco": no weight is stored on the grid',
        ),
        ("block = 16", 'quantize.block = 16: granularity is not "block"'),
        (
            'granularity = "none", scale_rule = "ocp"',
            'quantize.scale_rule = "ocp": granularity is "none"',
        ),
        (FLOW % "block = 16", 'quantize.activations.block = 16: granularity is not "block"'),
        (
            FLOW % 'scale_mode = "current", amax_history = 4',
            'quantize.activations.amax_history = 4: scale_mode is "current"',
        ),
        (
            'activations = {format = "BF16", scale_rule = "exact"}',
            'quantize.activations.scale_rule = "exact": the scale of BF16 is 1',
        ),
    ],
)
def test_an_option_without_effect_is_said_to_be_with_the_reason(experiment, registry, options, said):
    assert idle(experiment, registry, options) == [said]


@pytest.mark.parametrize(
    "options",
    [
        'storage = "grid", storage_rounding = "stochastic"',
        'rounding = "up", overflow = "ieee", granularity = "block", block = 16',
        'storage = "grid", rounding = "up", rule = [{layers = ".*mlp.*", storage = "master"}]',
        'storage_rounding = "eco", rule = [{layers = ".*mlp.*", storage = "grid"}]',
        'scale_rule = "ocp", rule = [{layers = ".*mlp.*", format = "BF16"}]',
        "activations = {block = 16, amax_history = 4}",
        FLOW % "amax_history = 4",
    ],
)
def test_an_option_that_matters_to_some_layer_is_not_said_to_have_no_effect(experiment, registry, options):
    assert idle(experiment, registry, options) == []


def test_an_option_that_matters_in_one_run_of_a_grid_is_no_note_of_the_check(experiment_at):
    text = 'name = "e"\nquantize = {format = "E5M2", storage_rounding = "eco", rounding = "up"}\n[grid]\n'
    text += '"quantize.storage" = ["master"%s]\nseed = [1, 2]'
    notes = [list(check(experiment_at(text % more), Path("none"))) for more in ("", ', "grid"')]
    counts = [sum("no effect" in line for line in lines) for lines in notes]
    assert counts == [1, 0]


def test_an_option_that_is_a_table_of_its_own_shows_what_belongs_together():
    @attrs.frozen
    class Shift:
        chain: dict[str, str]

    policy = FallbackChoice("shift", Shift({"E7M0": "E5M2", "E5M2": "stop"}))
    assert shown(policy) == "shift (chain E7M0=E5M2 E5M2=stop)"
