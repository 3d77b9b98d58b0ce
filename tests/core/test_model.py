"""nanoGPT's names, shapes, initial weights and arithmetic."""

import copy
import math
import subprocess
import sys

import attrs
import pytest
import torch
from torch import nn

from altgrad_core.model import GPT, IGNORED
from altgrad_core.model_options import ModelOptions
from altgrad_core.random_bits import draw_seed
from altgrad_core.shapes import Architecture, linear_shapes, parameter_count, parameter_shapes

VOCABULARY = 11
SMALL = ModelOptions(n_layer=2, n_head=3, n_embd=12, block_size=8)
CONFIGURATIONS = [
    attrs.evolve(SMALL, bias=bias, tie_weights=tied, **sizes)
    for bias in (False, True)
    for tied in (False, True)
    for sizes in ({}, {"n_layer": 1, "n_head": 1, "n_embd": 5, "block_size": 3})
]
configurations = pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)


def build(options: ModelOptions = SMALL, seed: int = 0, vocab_size: int = VOCABULARY) -> GPT:
    return GPT(options, vocab_size, torch.Generator().manual_seed(seed))


def draw_tokens(options: ModelOptions = SMALL, rows: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, options.block_size), generator=generator)


# --- names and shapes ----------------------------------------------------------------------------------


def test_the_names_are_nanogpts():
    options = ModelOptions(n_layer=1, n_head=2, n_embd=4, block_size=3, bias=True, tie_weights=False)
    assert parameter_shapes(Architecture(options, 7)) == {
        "transformer.wte.weight": (7, 4),
        "transformer.wpe.weight": (3, 4),
        "transformer.h.0.ln_1.weight": (4,),
        "transformer.h.0.ln_1.bias": (4,),
        "transformer.h.0.attn.c_attn.weight": (12, 4),
        "transformer.h.0.attn.c_attn.bias": (12,),
        "transformer.h.0.attn.c_proj.weight": (4, 4),
        "transformer.h.0.attn.c_proj.bias": (4,),
        "transformer.h.0.ln_2.weight": (4,),
        "transformer.h.0.ln_2.bias": (4,),
        "transformer.h.0.mlp.c_fc.weight": (16, 4),
        "transformer.h.0.mlp.c_fc.bias": (16,),
        "transformer.h.0.mlp.c_proj.weight": (4, 16),
        "transformer.h.0.mlp.c_proj.bias": (4,),
        "transformer.ln_f.weight": (4,),
        "transformer.ln_f.bias": (4,),
        "lm_head.weight": (7, 4),
    }


@configurations
def test_the_parameters_are_those_of_shapes_in_the_same_order(options):
    built = [(name, tuple(parameter.shape)) for name, parameter in build(options).named_parameters()]
    assert built == list(parameter_shapes(Architecture(options, VOCABULARY)).items())


@configurations
def test_the_linears_are_those_of_shapes_in_the_same_order(options):
    modules = build(options).named_modules()
    built = [(name, tuple(module.weight.shape)) for name, module in modules if isinstance(module, nn.Linear)]
    assert built == list(linear_shapes(Architecture(options, VOCABULARY)).items())


@configurations
def test_a_checkpoint_holds_the_parameters_and_the_tied_head_too(options):
    expected = dict.fromkeys([*parameter_shapes(Architecture(options, VOCABULARY)), "lm_head.weight"])
    assert list(build(options).state_dict()) == list(expected)


@configurations
def test_the_count_without_embeddings_leaves_out_a_tied_head_too(options):
    model = build(options)
    everything = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.transformer.wpe.weight.numel() + model.transformer.wte.weight.numel()
    assert parameter_count(Architecture(options, VOCABULARY), embeddings=True) == everything
    assert parameter_count(Architecture(options, VOCABULARY), embeddings=False) == everything - embeddings


def test_gpt2_has_124_million_parameters():
    gpt2 = ModelOptions(n_layer=12, n_head=12, n_embd=768, block_size=1024, bias=True)
    assert parameter_count(Architecture(gpt2, 50257), embeddings=True) == 124_439_808


def test_shapes_and_locator_import_no_torch():
    code = "import sys, altgrad_core.shapes, altgrad_core.locator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- tying and initial weights -------------------------------------------------------------------------


def test_a_tied_head_is_the_token_embedding():
    model = build()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_an_untied_head_draws_its_own_weights():
    model = build(attrs.evolve(SMALL, tie_weights=False))
    assert not (model.lm_head.weight == model.transformer.wte.weight).any()


def test_a_deepcopy_keeps_the_tie():
    model = copy.deepcopy(build())
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("change", [{"tie_weights": False}, {"bias": True}, {"dropout": 0.5}], ids=str)
def test_a_change_elsewhere_leaves_the_initial_weights(change):
    changed = dict(build(attrs.evolve(SMALL, **change)).named_parameters())
    assert all(torch.equal(parameter, changed[name]) for name, parameter in build().named_parameters())


def test_one_more_block_leaves_the_weights_of_the_others():
    deeper = dict(build(attrs.evolve(SMALL, n_layer=3)).named_parameters())
    shared = [name for name, _ in build().named_parameters() if not name.endswith("c_proj.weight")]
    assert all(torch.equal(build().get_parameter(name), deeper[name]) for name in shared)


def test_a_seed_fixes_the_weights_and_another_changes_all_of_them():
    first, again, other = build(seed=1), build(seed=1), build(seed=2)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert parameter.ndim == 1 or not (parameter == other.get_parameter(name)).any()


def test_no_two_parameters_share_a_stream():
    named = build(attrs.evolve(SMALL, tie_weights=False)).named_parameters()
    matrices = {name: parameter for name, parameter in named if parameter.ndim == 2}
    firsts = {  # in standard deviations: equal where two parameters draw from one stream
        round(parameter[0, 0].item() / (0.01 if "c_proj" in name else 0.02), 4)
        for name, parameter in matrices.items()
    }
    assert len(firsts) == len(matrices)


def test_building_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    build()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_building_draws_from_the_generator_once():
    used, expected = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    GPT(SMALL, VOCABULARY, used)
    draw_seed(expected)
    assert torch.equal(used.get_state(), expected.get_state())


def test_initial_weights_have_nanogpts_spread():
    options = ModelOptions(n_layer=2, n_head=2, n_embd=64, block_size=64, bias=True, tie_weights=False)
    for name, parameter in build(options, vocab_size=256).named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        std = 0.01 if name.endswith("c_proj.weight") else 0.02  # 0.02 / sqrt(2 * 2 layers)
        # Six standard errors of the mean and of the standard deviation of that many normal numbers.
        assert abs(parameter.mean()) < 6 * std / math.sqrt(parameter.numel()), name
        assert abs(parameter.std() / std - 1) < 6 / math.sqrt(2 * parameter.numel()), name


# --- arithmetic ----------------------------------------------------------------------------------------


def layer_norm(x, weight, bias):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def reference_logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """GPT-2's forward pass written out, one head and one sequence position after the other."""
    options, weights = model.options, model.state_dict()

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def normalized(x, name):
        return layer_norm(x, weights[f"{name}.weight"], weights.get(f"{name}.bias", 0.0))

    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][: tokens.shape[1]]
    for block in (f"transformer.h.{layer}" for layer in range(options.n_layer)):
        queries, keys, values = linear(normalized(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(
            3, dim=-1
        )
        mixed = torch.zeros_like(x)
        width = options.n_embd // options.n_head
        for head in (slice(start, start + width) for start in range(0, options.n_embd, width)):
            for t in range(tokens.shape[1]):
                past = slice(0, t + 1)
                scores = (keys[:, past, head] @ queries[:, t, head, None]).squeeze(-1) / math.sqrt(width)
                shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
                mixed[:, t, head] = (shares[..., None] * values[:, past, head]).sum(1)
        x = x + linear(mixed, f"{block}.attn.c_proj")
        inner = linear(normalized(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        gelu = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = x + linear(gelu, f"{block}.mlp.c_proj")
    return linear(normalized(x, "transformer.ln_f"), "lm_head")


@pytest.mark.parametrize("bias", [False, True])
def test_the_logits_are_those_of_the_forward_pass_written_out(bias):
    model = build(attrs.evolve(SMALL, bias=bias)).double()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the initial values, where every part counts
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)), alpha=0.3
            )
    tokens = draw_tokens()
    logits, _ = model(tokens, tokens)
    # Some 10^3 roundings of 2^-53 in numbers of order 10 to 100 add up to less than 1e-11.
    torch.testing.assert_close(logits, reference_logits(model, tokens), rtol=0, atol=1e-11)


def hand_loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy in float64, and a bound on the error of a float32 computation of it."""
    exact = logits.double()
    each = exact.exp().sum(-1).log() - exact.gather(-1, targets[..., None]).squeeze(-1)
    spread = (exact.amax() - exact.amin()).item()
    # In units of 2^-24: two shifts by the maximum (spread each), the sum of the exponentials (one rounding
    # each, and 4 in exp), its logarithm and the last subtraction (loss each), the sum over the targets.
    vocabulary, count, largest = logits.shape[-1], targets.numel(), each.abs().max().item()
    return each.mean().item(), 2**-24 * (2 * spread + vocabulary + 4 + (2 + count) * largest)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_is_the_mean_cross_entropy_in_nats_in_float32(parameters, autocast):
    model, tokens, targets = build().to(parameters), draw_tokens(), draw_tokens(seed=1)
    model.transformer.wte.weight.data.mul_(50)  # logits of several nats, not all alike
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits, loss = model(tokens, targets)
    expected, tolerance = hand_loss(logits, targets)
    assert logits.dtype == (torch.bfloat16 if autocast else parameters)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected) <= tolerance < 1e-4


def test_an_ignored_target_does_not_count():
    model, tokens, targets = build(), draw_tokens(), draw_tokens(seed=1)
    logits, loss = model(tokens, torch.where(torch.arange(8) < 5, targets, IGNORED))
    expected, tolerance = hand_loss(logits[:, :5], targets[:, :5])
    assert abs(loss.item() - expected) <= tolerance


def test_without_targets_only_the_last_position_is_answered():
    model, tokens = build().double(), draw_tokens()
    logits, loss = model(tokens)
    assert loss is None
    assert logits.shape == (2, 1, VOCABULARY)
    torch.testing.assert_close(logits, model(tokens, tokens)[0][:, -1:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("position", range(SMALL.block_size))
def test_a_later_token_never_changes_earlier_logits(position):
    model, tokens = build(), draw_tokens()
    changed = tokens.clone()
    changed[:, position] = (tokens[:, position] + 1) % VOCABULARY
    logits, changed_logits = model(tokens, tokens)[0], model(changed, tokens)[0]
    assert torch.equal(logits[:, :position], changed_logits[:, :position])
    assert (logits[:, position:] != changed_logits[:, position:]).any(-1).all()


def test_every_parameter_gets_a_gradient():
    model, tokens = build(attrs.evolve(SMALL, bias=True, tie_weights=False)), draw_tokens()
    _, loss = model(tokens, draw_tokens(seed=1))
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("place", ["drop", "h.0.attn", "h.0.attn.resid_dropout", "h.1.mlp.dropout"])
def test_dropout_acts_where_nanogpt_has_it_and_in_training_only(place):
    model, tokens = build(attrs.evolve(SMALL, dropout=0.5)).eval(), draw_tokens()
    assert torch.equal(model(tokens)[0], build()(tokens)[0])
    model.transformer.get_submodule(place).training = True  # its children stay in evaluation
    assert not torch.equal(model(tokens)[0], build()(tokens)[0])


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="got 9 tokens in a row, expected at most block_size = 8"):
        build()(torch.zeros(1, 9, dtype=torch.int64))


def test_a_shorter_sequence_is_the_beginning_of_a_longer_one():
    model, tokens = build().double(), draw_tokens()
    logits = model(tokens, tokens)[0]
    torch.testing.assert_close(model(tokens[:, :5], tokens[:, :5])[0], logits[:, :5], rtol=1e-12, atol=1e-14)
