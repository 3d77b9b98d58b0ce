import copy
import io
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from altgrad_core.format import Format
from altgrad_core.groups import param_groups
from altgrad_core.quantized_linear import QuantizedLinear
from altgrad_core.quantizer import quantizer_of
from altgrad_core.rules import Rule
from altgrad_core.stiffness import grid_stiffness
from altgrad_core.surgery import dequantize_model, held_weights, quantize_model, quantized_layers

COARSE = Format(name="COARSE", bits=4, values=[k / 4 for k in range(-7, 8)])
FINE = Format(name="FINE", bits=8, values=[k / 128 for k in range(-127, 128)])
WIDE = Format(name="WIDE", bits=9, values=[k / 256 for k in range(-255, 256)])


class Counting(Format):
    """Counts how often something is quantized."""

    def __init__(self):
        super().__init__(name="COUNTING", bits=8, values=FINE.values)
        self.calls = 0

    def _quantize(self, *arguments):
        self.calls += 1
        return super()._quantize(*arguments)


class LayerNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        q, k, v = self.c_attn(x).split(x.shape[-1], dim=-1)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(width), Attention(width)
        self.ln_2, self.mlp = LayerNorm(width), MLP(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """In the style of nanoGPT: its own LayerNorm, a tied head, c_proj twice in each block."""

    def __init__(self, width=8, vocab=11, blocks=2):
        super().__init__()
        parts = {"wte": nn.Embedding(vocab, width), "wpe": nn.Embedding(6, width)}
        parts |= {"h": nn.ModuleList(Block(width) for _ in range(blocks)), "ln_f": LayerNorm(width)}
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens):
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[: tokens.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


LAYERS = [
    f"transformer.h.{index}.{name}"
    for index in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build()


@pytest.fixture
def gpt():
    return seeded(GPT)


@pytest.fixture
def tokens():
    return torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(2))


def quantized_by_hand(weight, format=FINE):
    """Q(w) under the largest power of two at which nothing saturates."""
    scale = 2.0**20
    while weight.detach().abs().max().item() * scale > format.largest:
        scale /= 2
    return format.quantize(weight.detach() * scale) / scale


def same_tensors(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


# --- what is quantized --------------------------------------------------------------------------------


def test_the_forward_pass_sees_the_quantized_weights(mlp, x):
    expected = F.linear(x, quantized_by_hand(mlp[0].weight), mlp[0].bias)
    expected = F.linear(expected.relu(), quantized_by_hand(mlp[2].weight), mlp[2].bias)
    assert torch.equal(quantize_model(mlp, FINE)(x), expected)


def test_a_model_in_nanogpts_style_is_quantized_but_for_its_tied_head(gpt, tokens):
    plain = gpt(tokens)
    assert quantize_model(gpt, COARSE) is gpt
    assert list(quantized_layers(gpt)) == LAYERS
    assert type(gpt.lm_head) is nn.Linear
    assert not torch.equal(gpt(tokens), plain)


def test_the_scale_of_a_layer_is_known(mlp):
    mlp[0].weight.data.fill_(0.3)
    quantize_model(mlp, FINE)
    assert quantizer_of(mlp[0].weight).scale.item() == 2  # 0.3*2 is within 127/128
    assert quantizer_of(mlp[0].weight).scale.shape == ()
    assert quantizer_of(mlp[0].bias) is None


def test_the_scale_follows_the_weight(mlp, x):
    quantize_model(mlp, FINE)
    mlp[0].weight.data.fill_(3.0)
    mlp(x)
    assert quantizer_of(mlp[0].weight).scale.item() == 0.25


def test_a_static_scale_is_that_of_the_given_amax(mlp, x):
    quantize_model(mlp, FINE, scale_mode="static", amax=0.4)
    expected = FINE.quantize(mlp[0].weight.detach() * 2) / 2
    assert torch.equal(mlp[0](x), F.linear(x, expected, mlp[0].bias))


@pytest.mark.parametrize(("granularity", "shape"), [("channel", (8, 1)), ("block", (8, 6))])
def test_rows_and_blocks_have_scales_of_their_own_that_broadcast_and_stay_one_tensor(
    mlp, x, granularity, shape
):
    quantize_model(mlp, FINE, granularity=granularity)
    scale = quantizer_of(mlp[0].weight).scale
    mlp[0].weight.data[3] *= 100
    expected = torch.stack([quantized_by_hand(row) for row in mlp[0].weight])
    assert torch.equal(mlp[0](x), F.linear(x, expected, mlp[0].bias))
    assert quantizer_of(mlp[0].weight).scale is scale
    assert scale.shape == shape


def test_a_stiffness_takes_the_scales_of_rows(mlp):
    quantize_model(mlp, FINE, granularity="channel")
    mlp[0].weight.data[3] *= 100
    quantizer = quantizer_of(mlp[0].weight)
    quantizer.quantize(mlp[0].weight)
    spacing = grid_stiffness(mlp[0].weight.detach(), FINE, quantizer.scale)
    assert torch.equal(spacing, (1 / 128 / quantizer.scale).expand(8, 6))


def test_an_initial_scale_stays(mlp, x):
    mlp[0].weight.data.fill_(0.3)
    quantize_model(mlp, FINE, scale_mode="initial")
    mlp[0].weight.data.fill_(3.0)
    assert torch.equal(mlp[0](x), F.linear(x, torch.full((8, 6), FINE.largest / 2), mlp[0].bias))
    assert quantizer_of(mlp[0].weight).scale.item() == 2


def test_without_granularity_the_scale_is_one(mlp, x):
    quantize_model(mlp, COARSE, granularity="none")
    assert torch.equal(mlp[0](x), F.linear(x, COARSE.quantize(mlp[0].weight), mlp[0].bias))


def test_margin_is_head_room(mlp):
    mlp[0].weight.data.fill_(0.3)
    quantize_model(mlp, FINE, margin=2.0)
    assert quantizer_of(mlp[0].weight).scale.item() == 1


def test_rounding_is_as_asked(mlp, x):
    mlp[0].weight.data.fill_(0.3)  # 0.6*128 is 76.8
    quantize_model(mlp, FINE, rounding="toward_zero")
    assert torch.equal(mlp[0](x), F.linear(x, torch.full((8, 6), 76 / 256), mlp[0].bias))


def test_a_zero_weight_stays_zero(mlp, x):
    mlp[0].weight.data.zero_()
    quantize_model(mlp, FINE)
    assert torch.equal(mlp[0](x), mlp[0].bias.expand(5, 8))


def test_a_nan_weight_is_seen(mlp, x):
    mlp[0].weight.data[0, 0] = torch.nan
    assert quantize_model(mlp, FINE)(x).isnan().all()


@pytest.mark.parametrize("nothing", ["FP32", "none"])
def test_with_fp32_the_outputs_are_the_untouched_models(gpt, tokens, nothing):
    plain = gpt(tokens)
    assert torch.equal(quantize_model(gpt, nothing)(tokens), plain)
    assert quantized_layers(gpt) == {}


def test_with_fp32_by_rules_the_outputs_are_the_untouched_models(gpt, tokens):
    plain = gpt(tokens)
    assert torch.equal(quantize_model(gpt, rules=[Rule(".*", "FP32")])(tokens), plain)


def test_subclasses_of_linear_are_left_alone(x):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "head": nn.Linear(6, 2)})
    quantize_model(model, FINE)
    assert list(quantized_layers(model)) == ["head"]


# --- torch's transformers, which evaluate by a fused kernel past their Linears ---------------------------


def transformer():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()


SEQUENCES = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def evaluated(model, **options):
    with torch.no_grad():
        return model(SEQUENCES, **options)


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy])
def test_a_transformers_layer_evaluates_its_quantized_weights(copied):
    model = seeded(transformer)
    plain = evaluated(model)
    model = copied(quantize_model(model, COARSE))
    torch.testing.assert_close(evaluated(model), model(SEQUENCES).detach())
    assert not torch.allclose(evaluated(model), plain, atol=1e-3)


def test_linears_quantized_without_their_transformer_are_evaluated_quantized_too():
    model = seeded(transformer)
    quantize_model(nn.ModuleList([model.linear1, model.linear2]), COARSE)
    torch.testing.assert_close(evaluated(model), model(SEQUENCES).detach())


@pytest.mark.parametrize("activations", [None, COARSE])
def test_an_encoder_evaluates_padded_sequences_quantized(activations):
    model = seeded(lambda: nn.TransformerEncoder(transformer(), 2)).eval()
    padding = {"src_key_padding_mask": PADDED}
    plain = evaluated(model, **padding)
    quantize_model(model, COARSE, activations=activations)
    seen = evaluated(model, **padding)
    torch.testing.assert_close(seen, model(SEQUENCES, **padding).detach())
    assert not torch.allclose(seen[0], plain[0], atol=1e-3)


def test_a_dequantized_transformer_evaluates_by_the_fused_kernel_again():
    model = seeded(lambda: nn.TransformerEncoder(transformer(), 2)).eval()
    before = [list(vars(module)) for module in model.modules()]
    plain = evaluated(model, src_key_padding_mask=PADDED)
    dequantize_model(quantize_model(model, COARSE))
    assert torch.equal(evaluated(model, src_key_padding_mask=PADDED), plain)
    assert [list(vars(module)) for module in model.modules()] == before
    assert model.use_nested_tensor
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_of_others_stay_when_a_layer_is_dequantized(mlp, x):
    seen = []
    quantize_model(mlp, FINE)
    mlp[0].register_forward_pre_hook(lambda module, inputs: seen.append(module))
    dequantize_model(mlp)(x)
    assert seen == [mlp[0]]


# --- what is quantized once -------------------------------------------------------------------------------


def test_a_layer_that_the_model_calls_in_two_places_is_quantized_once():
    layer = nn.Linear(4, 4)
    model = quantize_model(nn.Sequential(layer, nn.ReLU(), layer), FINE)
    assert list(quantized_layers(model)) == ["0"]
    assert model(torch.ones(1, 4)).shape == (1, 4)


def test_linears_that_share_a_parameter_share_a_quantizer():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = quantize_model(nn.Sequential(first, second), FINE)
    assert first.quantizer is second.quantizer
    model(torch.ones(1, 4)).sum().backward()
    assert len(list(model.parameters())) == 3


def test_linears_that_share_a_parameter_cannot_have_two_formats():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    with pytest.raises(ValueError, match="'0' and '1' share one weight, which cannot be FINE and COARSE"):
        quantize_model(model, rules=[Rule("0", FINE), Rule("1", COARSE)])
    assert quantized_layers(model) == {}


def test_a_parameter_that_another_model_has_quantized_is_refused_and_nothing_changes():
    one, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other[1].weight = one[0].weight
    quantize_model(one, FINE)
    with pytest.raises(
        ValueError, match=r"the weight of '1' is shared with another model, .* to FINE; dequant"
    ):
        quantize_model(other, COARSE)
    assert quantized_layers(other) == {}
    assert quantizer_of(one[0].weight) is one[0].quantizer
    quantize_model(nn.ModuleList([dequantize_model(one), other]), COARSE)
    assert one[0].quantizer is other[1].quantizer


def test_a_table_of_options_is_a_format(mlp):
    with pytest.raises(ValueError, match="BOGUS"):
        quantize_model(mlp, {"plugin": "BOGUS"})
    assert quantized_layers(mlp) == {}


# --- what stays as it was -------------------------------------------------------------------------------


def test_parameters_stay_the_same_objects_under_the_same_names(gpt):
    before = dict(gpt.named_parameters())
    bits = [parameter.detach().clone() for parameter in before.values()]
    quantize_model(gpt, FINE)
    after = dict(gpt.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert same_tensors(list(after.values()), bits), "the weights themselves are not rounded"


def test_the_head_stays_tied(gpt):
    quantize_model(gpt, FINE)
    assert gpt.transformer.wte.weight is gpt.lm_head.weight


def test_modules_stay_the_same_objects_and_remain_linears(gpt):
    before = dict(gpt.named_modules())
    quantize_model(gpt, FINE)
    assert dict(gpt.named_modules()) == before
    assert isinstance(gpt.transformer.h[0].mlp.c_fc, nn.Linear)


def test_checkpoints_load_strictly_both_ways(gpt, tokens):
    plain = seeded(GPT)
    quantize_model(gpt, FINE)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter += 1
    plain.load_state_dict(gpt.state_dict(), strict=True)
    assert same_tensors(list(plain.parameters()), list(gpt.parameters()))
    gpt.load_state_dict(seeded(GPT).state_dict(), strict=True)
    assert torch.equal(gpt(tokens), quantize_model(seeded(GPT), FINE)(tokens))


def test_a_checkpoint_may_replace_the_parameters(mlp, x):
    quantize_model(mlp, FINE)
    state = {name: 3 * value for name, value in mlp.state_dict().items()}
    before = mlp[0].weight
    mlp.load_state_dict(state, assign=True)
    assert mlp[0].weight is not before
    assert quantizer_of(before) is None
    assert quantizer_of(mlp[0].weight) is mlp[0].quantizer


# --- models made on `meta`, without values ----------------------------------------------------------------


def on_meta(**options):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    flow = {"format": FINE}
    return quantize_model(model, FINE, activations=flow, gradients=flow, **options)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_mode": "initial"},
        {"scale_mode": "static", "amax": 3.0},
        {"granularity": "channel"},
        {"granularity": "block", "scale_mode": "initial"},
    ],
)
def test_a_model_quantized_on_meta_computes_as_one_quantized_with_its_values(mlp, x, assign, options):
    model = on_meta(**options)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(copy.deepcopy(mlp.state_dict()), assign=assign)
    quantize_model(mlp, FINE, activations=FINE, gradients=FINE, **options)
    for one in (model, mlp):
        with held_weights(one):
            one(x).square().sum().backward()
    assert torch.equal(model(x), mlp(x))
    assert same_tensors([one.grad for one in model.parameters()], [one.grad for one in mlp.parameters()])
    assert quantizer_of(model[0].weight) is model[0].quantizer


def test_an_initial_scale_of_a_model_from_meta_is_that_of_its_first_values(mlp, x):
    model = on_meta(scale_mode="initial").to_empty(device="cpu")
    model.load_state_dict(mlp.state_dict())
    model(x)
    scale = model[0].quantizer.scale.item()
    model[0].weight.data.mul_(100)
    model(x)
    assert model[0].quantizer.scale.item() == scale > 1


def test_a_saved_state_needs_no_class_of_ours(gpt):
    quantize_model(gpt, FINE)
    file = io.BytesIO()
    torch.save(gpt.state_dict(), file)
    file.seek(0)
    assert same_tensors(list(torch.load(file, weights_only=True).values()), list(gpt.state_dict().values()))


def test_an_optimizer_made_before_the_surgery_trains(mlp, x):
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=0.01, fused=True)
    quantize_model(mlp, FINE)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (mlp(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_the_quantizer_is_in_no_state(gpt):
    names = list(gpt.state_dict())
    quantize_model(gpt, FINE)
    assert list(gpt.state_dict()) == names
    assert list(gpt.buffers()) == []


# --- gradients ------------------------------------------------------------------------------------------


def test_gradients_pass_straight_through(mlp, x):
    reference = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    for layer in (reference[0], reference[2]):
        layer.weight.data = quantized_by_hand(layer.weight)
    quantize_model(mlp, FINE)
    for model in (mlp, reference):
        model(x).square().sum().backward()
    assert same_tensors([one.grad for one in mlp.parameters()], [one.grad for one in reference.parameters()])


def test_saturated_weights_keep_their_gradient(mlp, x):
    quantize_model(mlp, FINE, scale_mode="initial")
    mlp[0].weight.data.fill_(100.0)
    mlp(x).sum().backward()
    assert (mlp[0].weight.grad != 0).any()


def test_the_scale_gets_no_gradient(mlp, x):
    quantize_model(mlp, FINE)
    mlp(x).sum().backward()
    assert not quantizer_of(mlp[0].weight).scale.requires_grad


# --- copies, moves, compilation -----------------------------------------------------------------------


def test_a_deep_copy_has_a_quantizer_of_its_own_on_its_own_parameter(gpt, tokens):
    quantize_model(gpt, FINE)
    twin = copy.deepcopy(gpt)
    for mine, other in zip(quantized_layers(gpt).items(), quantized_layers(twin).items(), strict=True):
        assert mine[0] == other[0]
        assert mine[1] is not other[1]
        assert mine[1].scale is not other[1].scale
        assert quantizer_of(twin.get_submodule(other[0]).weight) is other[1]
        assert quantizer_of(gpt.get_submodule(mine[0]).weight) is mine[1]
    assert twin.transformer.wte.weight is twin.lm_head.weight
    assert torch.equal(twin(tokens), gpt(tokens))


def test_a_deep_copy_shares_nothing_that_changes(mlp, x):
    quantize_model(mlp, FINE)
    twin = copy.deepcopy(mlp)
    before = twin(x)
    mlp[0].weight.data.mul_(5)
    mlp(x)
    assert torch.equal(twin(x), before)


def test_a_pickled_model_comes_back_quantized(gpt, tokens):
    quantize_model(gpt, FINE)
    back = pickle.loads(pickle.dumps(gpt))
    assert torch.equal(back(tokens), gpt(tokens))
    assert list(quantized_layers(back)) == LAYERS
    layer = back.transformer.h[0].attn.c_attn
    assert quantizer_of(layer.weight) is layer.quantizer


def test_a_model_saved_whole_comes_back_quantized(mlp, x):
    quantize_model(mlp, FINE)
    file = io.BytesIO()
    torch.save(mlp, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), mlp(x))


def test_the_model_moves_to_another_dtype(mlp, x):
    quantize_model(mlp, FINE)
    expected = quantized_by_hand(mlp[0].weight).double()
    mlp.to(torch.float64)
    assert torch.equal(mlp[0](x.double()), F.linear(x.double(), expected, mlp[0].bias))
    mlp(x.double()).sum().backward()
    assert mlp[0].weight.grad.dtype == torch.float64
    assert quantizer_of(mlp[0].weight) is mlp[0].quantizer


def test_the_quantizer_follows_a_move_that_replaces_the_parameters(mlp, x):
    quantize_model(mlp, FINE)
    before = mlp[0].weight
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        mlp.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert mlp[0].weight is not before
    assert quantizer_of(mlp[0].weight) is mlp[0].quantizer


def test_the_scale_follows_the_weight_to_another_device(mlp):
    quantize_model(mlp, FINE)
    mlp.to("meta")
    assert quantizer_of(mlp[0].weight).scale.device.type == "meta"


def test_under_bfloat16_autocast_the_grid_stays_exact(mlp, x):
    quantize_model(mlp, FINE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = mlp[0](x)
        expected = F.linear(x, quantized_by_hand(mlp[0].weight), mlp[0].bias)
    assert torch.equal(seen, expected)


@pytest.mark.slow  # compiling takes 10 s
def test_a_compiled_model_computes_the_same(mlp, x):
    quantize_model(mlp, FINE)
    compiled = torch.compile(mlp)
    for factor in (1, 3):
        mlp[0].weight.data.mul_(factor)
        torch.testing.assert_close(compiled(x), mlp(x))
    with held_weights(mlp):
        torch.testing.assert_close(compiled(x), mlp(x))
    compiled(x).sum().backward()
    seen = mlp[0].weight.grad.clone()
    mlp.zero_grad()
    mlp(x).sum().backward()
    torch.testing.assert_close(seen, mlp[0].weight.grad)


@pytest.mark.slow  # compiling takes 10 s each
@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_compiled_scales_of_rows_and_blocks_are_those_of_eager(granularity):
    model = quantize_model(seeded(lambda: nn.Sequential(nn.Linear(64, 64))), FINE, granularity=granularity)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(torch.compile(model)(x), model(x))


# --- undoing it -----------------------------------------------------------------------------------------


def test_dequantizing_restores_classes_bits_and_outputs(gpt, tokens):
    plain = seeded(GPT)
    before = [type(module) for module in gpt.modules()]
    quantize_model(gpt, FINE)
    gpt(tokens)
    assert dequantize_model(gpt) is gpt
    assert [type(module) for module in gpt.modules()] == before
    assert torch.equal(gpt(tokens), plain(tokens))
    assert all(quantizer_of(parameter) is None for parameter in gpt.parameters())
    assert not hasattr(gpt.transformer.h[0].mlp.c_fc, "quantizer")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_layer_parametrized_since_is_not_dequantized_and_nothing_changes(mlp):
    quantize_model(mlp, FINE)
    nn.utils.parametrize.register_parametrization(mlp[2], "weight", Doubled())
    with pytest.raises(
        ValueError, match=r"'2' is a ParametrizedQuantizedLinear now, .*remove_parametrizations"
    ):
        dequantize_model(mlp)
    assert list(quantized_layers(mlp)) == ["0", "2"]
    nn.utils.parametrize.remove_parametrizations(mlp[2], "weight")
    assert [type(module) for module in dequantize_model(mlp)] == [nn.Linear, nn.ReLU, nn.Linear]
    assert quantizer_of(mlp[2].weight) is None


def test_a_dequantized_model_can_be_quantized_again(gpt, tokens):
    quantize_model(gpt, COARSE)
    quantize_model(dequantize_model(gpt), FINE)
    assert torch.equal(gpt(tokens), quantize_model(seeded(GPT), FINE)(tokens))


def test_linears_that_share_a_parameter_are_dequantized():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = dequantize_model(quantize_model(nn.Sequential(first, second), FINE))
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]


def test_dequantizing_an_untouched_model_changes_nothing(mlp):
    assert quantized_layers(dequantize_model(mlp)) == {}


# --- refusals -------------------------------------------------------------------------------------------


def test_quantizing_twice_is_an_error(mlp):
    quantize_model(mlp, FINE)
    with pytest.raises(ValueError, match="quantized already; dequantize_model"):
        quantize_model(mlp, FINE)


def test_exactly_one_of_format_and_rules_is_given(mlp):
    with pytest.raises(ValueError, match="either a format or rules="):
        quantize_model(mlp)
    with pytest.raises(ValueError, match="either a format or rules="):
        quantize_model(mlp, FINE, rules=[Rule(".*", FINE)])


def test_a_model_without_linears_is_refused():
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        quantize_model(nn.Sequential(nn.Conv1d(2, 2, 1)), FINE)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("rounding", "stochastic", "nearest_even"),
        ("overflow", "wrap", "saturate"),
        ("granularity", "row", "'none', 'tensor', 'channel', 'block'"),
        ("scale_mode", "adaptive", "'current', 'initial'"),
        ("scale_mode", "delayed", "'current', 'initial', 'static'"),
        ("margin", 0.0, "a positive number"),
    ],
)
def test_an_unknown_option_is_refused_and_nothing_changes(mlp, option, value, reason):
    with pytest.raises(ValueError, match=reason):
        quantize_model(mlp, FINE, **{option: value})
    assert quantized_layers(mlp) == {}


def test_a_misspelt_option_is_refused_by_name_and_nothing_changes(mlp):
    with pytest.raises(ValueError, match=r"'granularty' is no option .* did you mean 'granularity'"):
        quantize_model(mlp, FINE, granularty="channel")
    with pytest.raises(ValueError, match=r"margin is head room, a positive number .* not '2'"):
        quantize_model(mlp, FINE, margin="2")
    assert quantized_layers(mlp) == {}


def test_an_unknown_format_is_refused(mlp):
    with pytest.raises(ValueError, match="E4M33"):
        quantize_model(mlp, "E4M33")


# --- rules ----------------------------------------------------------------------------------------------


def formats(model):
    return {name: quantizer.format for name, quantizer in quantized_layers(model).items()}


def test_the_first_match_over_the_full_path_wins(gpt):
    rules = [Rule(r".*\.0\.mlp\.c_proj", COARSE), Rule(r".*\.c_proj", FINE), Rule(r".*c_proj", COARSE)]
    quantize_model(gpt, rules=rules)
    assert formats(gpt) == {
        "transformer.h.0.attn.c_proj": FINE,
        "transformer.h.0.mlp.c_proj": COARSE,
        "transformer.h.1.attn.c_proj": FINE,
        "transformer.h.1.mlp.c_proj": FINE,
    }


def test_a_rule_matches_the_whole_path(gpt):
    with pytest.raises(ValueError, match="'c_proj' matches no Linear"):
        quantize_model(gpt, rules=[Rule("c_proj", FINE)])


def test_a_rule_that_matches_nothing_lists_the_layers_and_changes_nothing(gpt):
    with pytest.raises(ValueError, match=r"'\.\*c_porj' matches no Linear; there are: transformer\.h\.0"):
        quantize_model(gpt, rules=[Rule(".*mlp.*", FINE), Rule(".*c_porj", FINE)])
    assert quantized_layers(gpt) == {}


def test_an_fp32_rule_excludes_layers_from_later_ones(gpt):
    quantize_model(gpt, rules=[Rule(r".*\.attn\..*", "FP32"), Rule(r"transformer\..*", FINE)])
    assert list(formats(gpt)) == [name for name in LAYERS if ".mlp." in name]


def test_a_rule_without_a_format_is_refused(gpt):
    with pytest.raises(ValueError, match="has no format"):
        quantize_model(gpt, rules=[Rule(".*mlp.*")])


def test_a_rule_must_be_a_regular_expression_and_name_a_storage():
    with pytest.raises(ValueError, match="no regular expression"):
        Rule("*.mlp", FINE)
    with pytest.raises(ValueError, match="'gird'"):
        Rule(".*mlp", FINE, storage="gird")


def test_a_tied_head_is_quantized_where_a_rule_names_it(gpt, tokens):
    plain = gpt(tokens)
    quantize_model(gpt, rules=[Rule("lm_head", COARSE)])
    quantizer = quantizer_of(gpt.lm_head.weight)
    assert (quantizer.storage, quantizer.covered) == ("master", False)
    assert gpt.transformer.wte.weight is gpt.lm_head.weight
    assert not torch.equal(gpt(tokens), plain)
    assert torch.equal(gpt.transformer.wte(tokens), F.embedding(tokens, gpt.lm_head.weight))


def test_a_tied_head_cannot_live_on_the_grid(gpt):
    with pytest.raises(ValueError, match="'lm_head' shares its weight with an embedding"):
        quantize_model(gpt, rules=[Rule("lm_head", FINE, storage="grid")])
    assert quantized_layers(gpt) == {}


def test_an_untied_head_is_a_linear_like_any_other(gpt):
    gpt.lm_head.weight = nn.Parameter(gpt.lm_head.weight.detach().clone())
    quantize_model(gpt, FINE)
    assert "lm_head" in quantized_layers(gpt)


@pytest.mark.parametrize(
    ("format", "storage", "expected"),
    [
        (FINE, None, (None, True)),
        (FINE, "grid", ("grid", True)),
        (FINE, "master", ("master", True)),
        (WIDE, None, ("master", False)),
        (WIDE, "grid", ("grid", True)),
        (WIDE, "master", ("master", True)),
    ],
)
def test_wide_formats_in_a_rule_are_masters_unless_it_says_otherwise(mlp, format, storage, expected):
    quantize_model(mlp, rules=[Rule("0", format, storage=storage)])
    quantizer = quantizer_of(mlp[0].weight)
    assert (quantizer.storage, quantizer.covered) == expected


# --- held weights ---------------------------------------------------------------------------------------


@pytest.fixture
def counted(mlp):
    format = Counting()
    quantize_model(mlp, format)
    format.calls = 0
    return mlp, format


def test_each_weight_is_quantized_once_per_context(counted, x):
    model, format = counted
    expected = model(x)
    format.calls = 0
    with held_weights(model):
        assert format.calls == 2
        for _ in range(3):
            assert torch.equal(model(x), expected)
            model(x).sum().backward()
    assert format.calls == 2
    model(x)
    assert format.calls == 4


def test_the_gradient_of_held_weights_is_the_straight_through_one(mlp, x):
    quantize_model(mlp, FINE)
    for _ in range(2):
        mlp(x).square().sum().backward()
    expected = [parameter.grad for parameter in mlp.parameters()]
    mlp.zero_grad()
    with held_weights(mlp):
        for _ in range(2):
            mlp(x).square().sum().backward()
    assert same_tensors([parameter.grad for parameter in mlp.parameters()], expected)


def test_a_fused_step_is_seen_by_the_next_context(counted, x):
    model, _ = counted
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    outputs = []
    for _ in range(3):
        with held_weights(model):
            loss = model(x).square().sum()
            loss.backward()
        outputs.append(loss.item())
        optimizer.step()
        assert torch.equal(model[0](x), F.linear(x, quantized_by_hand(model[0].weight), model[0].bias))
    assert len(set(outputs)) == 3


def test_a_write_to_data_is_seen_by_the_next_forward_pass_and_the_next_context(counted, x):
    model, _ = counted
    with held_weights(model):
        before = model(x)
    model[0].weight.data.mul_(-2)
    assert not torch.equal(model(x), before)
    after = model(x)
    with held_weights(model):
        assert torch.equal(model(x), after)


def test_an_inner_context_leaves_the_outer_ones_weights_held(counted, x):
    model, format = counted
    with held_weights(model):
        with held_weights(model):
            model(x)
        model(x)
        assert format.calls == 2
    model(x)
    assert format.calls == 4


def test_after_an_exception_nothing_is_held(counted, x):
    model, format = counted

    def failing():
        with held_weights(model):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        failing()
    model[0].weight.data.fill_(1.0)
    model(x)
    assert format.calls == 4


def test_a_shared_parameter_is_held_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight, format = first.weight, Counting()
    model = quantize_model(nn.Sequential(first, second), format)
    with held_weights(model):
        model(torch.ones(1, 4))
        assert format.calls == 1


def test_holding_an_untouched_model_does_nothing(mlp, x):
    with held_weights(mlp):
        assert mlp(x).shape == (5, 3)


# --- groups for optimizers ------------------------------------------------------------------------------


def test_groups_split_by_format_matrix_and_vector(gpt):
    names = {parameter: name for name, parameter in gpt.named_parameters()}
    quantize_model(
        gpt, rules=[Rule(r".*\.mlp\..*", FINE), Rule(r".*\.c_attn", COARSE), Rule("lm_head", FINE)]
    )
    groups = param_groups(gpt)
    assert [group["format"] for group in groups] == [COARSE, FINE, None, None]
    assert ["weight_decay" in group for group in groups] == [False, False, False, True]
    assert groups[-1]["weight_decay"] == 0.0
    assert {names[one].rpartition(".")[0] for one in groups[0]["params"]} == {
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
    }
    assert {names[one] for one in groups[2]["params"]} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.1.attn.c_proj.weight",
    }, "a tied head trains as the embedding that it is"
    assert all(one.dim() == 1 for one in groups[3]["params"])


def test_the_scales_of_a_group_are_the_quantizers_own(mlp):
    quantize_model(mlp, FINE)
    (group, _) = param_groups(mlp)
    assert all(
        one is quantizer_of(weight).scale for one, weight in zip(group["scale"], group["params"], strict=True)
    )


def test_every_trainable_parameter_is_in_exactly_one_group(gpt):
    quantize_model(gpt, FINE)
    gpt.transformer.wpe.weight.requires_grad_(False)
    grouped = [id(one) for group in param_groups(gpt) for one in group["params"]]
    assert sorted(grouped) == sorted(id(one) for one in gpt.parameters() if one.requires_grad)


def test_an_untouched_model_has_groups_too(mlp):
    assert [(group["format"], group["scale"]) for group in param_groups(mlp)] == [(None, None)] * 2
    assert not any(group["covered"] for group in param_groups(mlp))


def test_a_covered_weight_without_a_format_is_in_a_group_of_its_own(gpt):
    covered = [gpt.transformer.h[0].mlp.c_fc.weight, gpt.transformer.h[1].mlp.c_fc.weight]
    quantize_model(gpt, rules=[Rule(r".*\.c_attn", FINE), Rule("lm_head", COARSE)])
    quantized, float32, matrices, vectors = param_groups(gpt, covered)
    assert [one["covered"] for one in (quantized, float32, matrices, vectors)] == [True, True, False, False]
    assert [id(one) for one in float32["params"]] == [id(one) for one in covered]
    assert (float32["format"], float32["scale"], "weight_decay" in float32) == (None, None, False)


def test_a_tied_head_is_the_embedding_that_it_is_even_where_it_is_said_to_be_covered(gpt):
    quantize_model(gpt, rules=[Rule("lm_head", COARSE)])
    assert not any(group["covered"] for group in param_groups(gpt, [gpt.lm_head.weight]))


# --- Hugging Face's transposed Linear -------------------------------------------------------------------


class Conv1D(nn.Module):
    """As transformers.pytorch_utils has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view((*x.size()[:-1], self.nf))


@pytest.fixture
def hugging_face(monkeypatch):
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    return seeded(lambda: nn.Sequential(Conv1D(8, 6), nn.GELU(), Conv1D(3, 8)))


def test_hugging_faces_conv1d_is_a_linear_too(hugging_face, x):
    expected = torch.addmm(hugging_face[0].bias, x, quantized_by_hand(hugging_face[0].weight))
    quantize_model(hugging_face, FINE)
    assert torch.equal(hugging_face[0](x), expected)
    assert hugging_face(x.expand(2, 5, 6)).shape == (2, 5, 3)
    assert isinstance(hugging_face[0], Conv1D)


@pytest.mark.parametrize(("granularity", "shape"), [("channel", (1, 8)), ("block", (6, 8))])
def test_channels_and_blocks_of_a_transposed_weight_run_along_its_inputs(hugging_face, granularity, shape):
    weight = hugging_face[0].weight
    expected = torch.stack([quantized_by_hand(column) for column in weight.t()]).t()
    quantize_model(hugging_face, FINE, granularity=granularity)
    assert torch.equal(quantizer_of(weight).quantize(weight), expected)
    assert quantizer_of(weight).scale.shape == shape


def test_a_model_of_conv1d_is_copied_pickled_and_dequantized(hugging_face, x):
    quantize_model(hugging_face, FINE)
    for twin in (copy.deepcopy(hugging_face), pickle.loads(pickle.dumps(hugging_face))):
        assert torch.equal(twin(x), hugging_face(x))
        assert quantizer_of(twin[0].weight) is twin[0].quantizer
        assert twin[0].quantizer is not hugging_face[0].quantizer
    dequantize_model(hugging_face)
    assert type(hugging_face[0]) is Conv1D
    assert not isinstance(hugging_face[0], QuantizedLinear)


def test_the_state_of_any_optimizer_over_the_groups_loads_without_pickles_of_code(mlp, tmp_path):
    quantize_model(mlp, COARSE)
    optimizer = torch.optim.AdamW(param_groups(mlp))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_a_quantized_layer_prints_its_format(mlp):
    assert f"format={COARSE.name}" in repr(quantize_model(mlp, COARSE))
