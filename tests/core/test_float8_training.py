"""Quantized Linears against torchao's float8 training, emulated on the CPU."""

import pytest
import torch
from torch import nn

from altgrad_core.surgery import quantize_model

float8 = pytest.importorskip("torchao.float8")


def perceptron():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96, bias=False), nn.GELU(), nn.Linear(96, 32, bias=False))


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_e4m3_forward_and_e5m2_backward_agree_with_torchao(table, powers_of_two):
    options = {"scale_rule": "fit" if powers_of_two else "exact", "scale_mode": "current"}
    ours = quantize_model(
        perceptron(),
        table("E4M3"),
        activations={"format": table("E4M3"), **options},
        gradients={"format": table("E5M2"), **options},
        **options,
    )
    config = float8.Float8LinearConfig(emulate=True, round_scales_to_power_of_2=powers_of_two)
    theirs = float8.convert_to_float8_training(perceptron(), config=config)
    x = torch.randn(4, 48, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for model in (ours, theirs):
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        y.square().sum().backward()
        found.append([y, inputs.grad, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        # the same grid values enter each product: its float32 sums differ in order only
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * other.abs().max().item())


def test_the_agreement_is_one_of_quantized_models(table):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    plain = perceptron()(x)
    quantized = quantize_model(perceptron(), table("E4M3"))(x)
    assert (quantized - plain).abs().max() > 1e-3 * plain.abs().max()
