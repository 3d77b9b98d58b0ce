"""Surgery on Hugging Face's own GPT-2, small and random."""

import copy

import pytest
import torch
import torch.nn.functional as F

from altgrad_core.recipe import Recipe
from altgrad_core.surgery import dequantize_model, quantize_model, quantized_flows, quantized_layers

transformers = pytest.importorskip("transformers")


@pytest.fixture
def gpt2():
    config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=16,
        n_embd=24,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).train()


@pytest.fixture
def tokens():
    return torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def quantized(gpt2, table):
    flow = {"format": table("E4M3"), "granularity": "channel"}
    return quantize_model(
        gpt2, table("E2M1"), granularity="block", block=16, activations=flow, gradients=table("E5M2")
    )


def test_every_conv1d_is_quantized_and_the_tied_head_is_not(quantized):
    names = [f"transformer.h.{n}.{part}" for n in range(2) for part in ("attn.c_attn", "attn.c_proj")]
    assert set(names) < set(quantized_layers(quantized))
    assert len(quantized_layers(quantized)) == 8
    assert len(quantized_flows(quantized)) == 16
    assert quantized.lm_head.weight is quantized.transformer.wte.weight
    assert type(quantized.lm_head) is torch.nn.Linear


def test_it_trains(quantized, tokens):
    optimizer = torch.optim.AdamW(quantized.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = quantized(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_blocks_run_along_the_inputs_of_the_transposed_weight(quantized, gpt2):
    layer = quantized.transformer.h[0].mlp.c_proj  # weight (96 in, 24 out)
    recipe = Recipe(format=layer.quantizer.format, granularity="block", block=16)
    expected = recipe.quantize(layer.weight.t(), recipe.scale_of(layer.weight.t())).t()
    assert torch.equal(layer.quantizer.quantize(layer.weight), expected)
    assert layer.quantizer.scale.shape == layer.weight.shape
    assert (layer.quantizer.scale[:16] == layer.quantizer.scale[:1]).all()


def test_checkpoints_load_strictly_both_ways_and_dequantizing_restores_everything(gpt2, tokens, table):
    plain = copy.deepcopy(gpt2)
    expected = plain(tokens).logits
    quantize_model(gpt2, table("E2M1"), activations=table("E4M3"))
    assert not torch.equal(gpt2(tokens).logits, expected)
    gpt2.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(gpt2.state_dict(), strict=True)
    dequantize_model(gpt2)
    assert [type(one) for one in gpt2.modules()] == [type(one) for one in plain.modules()]
    assert torch.equal(gpt2(tokens).logits, expected)


def test_with_fp32_the_outputs_are_the_untouched_models(gpt2, tokens):
    expected = gpt2(tokens).logits
    assert torch.equal(quantize_model(gpt2, "FP32")(tokens).logits, expected)


def test_a_conv1d_computes_what_a_linear_of_the_same_weight_does(gpt2, table):
    layer = gpt2.transformer.h[0].attn.c_proj
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    quantize_model(gpt2, table("E2M1"), granularity="channel", activations=table("E4M3"))
    weights, inputs = (Recipe(format=table("E2M1"), granularity="channel"), Recipe(format=table("E4M3")))
    weight = weights.quantize(layer.weight.t(), weights.scale_of(layer.weight.t()))
    expected = F.linear(inputs.quantize(x, inputs.scale_of(x)), weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
