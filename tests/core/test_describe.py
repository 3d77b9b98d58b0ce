"""What `--check` and the header of a run say of formats and scales."""

from altgrad_core.describe import rows, share_on_grid


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
    assert said(experiment, registry, "")["format"] == "FP32: nothing is quantised"


def test_scales_of_blocks_in_a_format_of_their_own_are_named(experiment, registry):
    text = 'quantize = {format = "E5M2", granularity = "block", block_scale = "E3M4"}'
    assert said(experiment, registry, text)["format"] == (
        "E5M2 stored as master (24 layers), one scale per block of 32 (in E3M4)"
    )


def test_activations_alone_put_nothing_on_a_grid(experiment, registry):
    text = 'quantize = {format = "none", storage = "grid", activations = {format = "E5M2"}}'
    assert said(experiment, registry, text)["format"] == "FP32: no weight is quantised"
    assert said(experiment, registry, text)["activations"].startswith("E5M2 (24 layers)")
    assert share_on_grid(experiment(f'name = "e"\n{text}'), registry) == 0
