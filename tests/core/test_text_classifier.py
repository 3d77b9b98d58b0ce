"""The classifier of documents: names, shapes, pooling, padding, loss."""

import attrs
import pytest
import torch
from torch import nn

from altgrad_core.model import GPT
from altgrad_core.model_options import ModelOptions
from altgrad_core.shapes import Architecture, linear_shapes, parameter_count, parameter_shapes
from altgrad_core.text_classifier import PADDING, TextClassifier

VOCABULARY, LABELS = 11, 5
SMALL = ModelOptions(n_layer=2, n_head=3, n_embd=12, block_size=8)
CONFIGURATIONS = [
    attrs.evolve(SMALL, bias=bias, tie_weights=tied) for bias in (False, True) for tied in (False, True)
]
configurations = pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)


def build(options=SMALL, labels=LABELS, seed=0):
    return TextClassifier(options, VOCABULARY, labels, torch.Generator().manual_seed(seed))


def stirred(labels=LABELS):
    """Return a model in float64 that is far from its initial weights, where every part counts."""
    model, generator = build(labels=labels).double(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def documents(*lengths, windows=2, seed=0):
    """Return random tokens of documents of these lengths, padded to whole windows: (B, windows, block)."""
    generator, size = torch.Generator().manual_seed(seed), windows * SMALL.block_size
    rows = torch.full((len(lengths), size), PADDING)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = torch.randint(VOCABULARY, (length,), generator=generator)
    return rows.view(len(lengths), windows, SMALL.block_size)


def logits_of(model, tokens):
    return model(tokens, torch.zeros(len(tokens), LABELS, dtype=model.classifier.weight.dtype))[0]


# --- names and shapes ----------------------------------------------------------------------------------


@configurations
def test_parameters_and_linears_are_those_of_shapes_in_the_same_order(options):
    model, architecture = build(options), Architecture(options, VOCABULARY, LABELS)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    linears = {
        name: tuple(one.weight.shape) for name, one in model.named_modules() if isinstance(one, nn.Linear)
    }
    assert list(shapes.items()) == list(parameter_shapes(architecture).items())
    assert list(linears.items()) == list(linear_shapes(architecture).items())
    assert parameter_count(architecture, embeddings=True) == sum(one.numel() for one in model.parameters())


def test_the_head_is_an_untied_linear_with_a_bias_of_its_own():
    head = build().classifier
    assert type(head) is nn.Linear
    assert head.weight.shape == (LABELS, 12)
    assert head.bias.tolist() == [0] * LABELS
    assert not Architecture(SMALL, VOCABULARY, LABELS).ties_head


def test_the_trunk_begins_with_the_weights_that_a_language_model_begins_with():
    trunk = build(seed=3).transformer.state_dict()
    own = GPT(SMALL, VOCABULARY, torch.Generator().manual_seed(3)).transformer.state_dict()
    assert all(torch.equal(trunk[name], own[name]) for name in own)


def test_the_global_generator_is_never_touched():
    before = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), before)


# --- arithmetic ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 8, 9, 16])
def test_logits_are_the_mean_over_windows_of_the_head_on_the_mean_over_tokens(length):
    model, tokens = stirred(), documents(length)
    windows = tokens.flatten()[:length].split(SMALL.block_size)
    by_window = [model.classifier(model.transformer(one[None])[0].mean(0)) for one in windows]
    expected = torch.stack(by_window).mean(0)
    # The shares 1/N are float32: each is off by 2^-24 of itself at most, in sums of numbers below 100.
    torch.testing.assert_close(logits_of(model, tokens)[0], expected, rtol=0, atol=1e-5)


def test_a_document_does_not_hang_on_those_beside_it():
    model, tokens = build(), documents(3, 16, 9)
    alone = torch.cat([logits_of(model, one[None]) for one in tokens])
    torch.testing.assert_close(logits_of(model, tokens), alone, rtol=0, atol=1e-6)


def test_more_windows_than_a_document_fills_change_nothing():
    model = build()
    few, many = documents(7, 10), documents(7, 10, windows=4)
    assert torch.equal(few, many[:, :2])
    torch.testing.assert_close(logits_of(model, few), logits_of(model, many), rtol=0, atol=1e-6)


def test_every_token_of_a_document_counts():
    model, tokens = build(), documents(11)
    before = logits_of(model, tokens)
    for place in range(11):
        changed = tokens.clone()
        changed.view(-1)[place] = (changed.view(-1)[place] + 1) % VOCABULARY
        assert not torch.equal(logits_of(model, changed), before), place


def hand_loss(logits, targets):
    """Return the mean binary cross-entropy in float64."""
    p = torch.sigmoid(logits.double())
    return -torch.where(targets > 0, p, 1 - p).log().mean().item()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_is_the_mean_binary_cross_entropy_in_nats_in_float32(autocast):
    model, tokens = stirred().float(), documents(3, 16, 9)
    targets = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits, loss = model(tokens, targets)
    assert logits.dtype == loss.dtype == torch.float32
    # 15 numbers of order 1, each with a few roundings of 2^-24.
    assert loss.item() == pytest.approx(hand_loss(logits, targets), rel=1e-5)


def test_every_parameter_gets_a_gradient():
    model = build(attrs.evolve(SMALL, bias=True))
    model(documents(8, 16, 12), torch.eye(3, LABELS))[1].backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
