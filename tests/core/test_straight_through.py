"""quantize_ste and quantize_gradient: what goes forward, what comes back."""

import pytest
import torch

from altgrad_core.recipe import Recipe
from altgrad_core.straight_through import quantize_gradient, quantize_ste


@pytest.fixture
def e2m1(table):
    """0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    return table("E2M1")


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


def test_forward_is_quantized_and_the_gradient_is_as_it_came(e2m1):
    x = leaf(0.7, -2.4, 5.1, 100.0)
    y = quantize_ste(x, e2m1, granularity="none")
    assert y.tolist() == [0.5, -2.0, 6.0, 6.0]
    y.backward(torch.tensor([0.3, -7.0, 1e-3, 2.0]))
    assert torch.equal(x.grad, torch.tensor([0.3, -7.0, 1e-3, 2.0]))


def test_with_clipping_what_saturated_gets_zero_gradient_and_no_nan(e2m1):
    x = leaf(6.0, 7.01, -100.0, 0.1)  # the next value would be 8
    y = quantize_ste(x, e2m1, granularity="none", clip_gradient=True)
    y.backward(torch.tensor([1.0, 2.0, torch.inf, 4.0]))
    assert x.grad.tolist() == [1.0, 0.0, 0.0, 4.0]


def test_what_comes_out_may_be_changed_in_place(e2m1):
    x = leaf(0.7, -2.4)
    y = quantize_ste(x, e2m1, granularity="none").relu_()
    assert y.tolist() == [0.5, 0.0]
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 0.0]


def test_a_tensor_with_a_quantized_gradient_is_no_copy_and_torch_refuses_to_change_it(e2m1):
    x = leaf(0.7, -2.4)
    y = quantize_gradient(x, e2m1)
    assert y.data_ptr() == x.data_ptr()
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        y.relu_()


def test_the_scale_gets_no_gradient(e2m1):
    x = leaf(0.1, 3.0)
    (quantize_ste(x, e2m1, scale_rule="exact") * torch.tensor([1.0, 10.0])).sum().backward()
    assert x.grad.tolist() == [1.0, 10.0]


def test_the_input_is_left_as_it_is(e2m1):
    x = torch.tensor([0.7, 0.9])
    assert quantize_ste(x, e2m1) is not x
    assert quantize_ste(x, e2m1).requires_grad is False
    assert x.tolist() == [pytest.approx(0.7), pytest.approx(0.9)]


def test_the_gradient_is_quantized_on_its_way_back_and_the_value_is_untouched(e2m1):
    x = leaf(0.7, -2.4, 5.1)
    y = quantize_gradient(x, e2m1, granularity="none")
    assert torch.equal(y, x)
    y.backward(torch.tensor([0.7, -2.4, 100.0]))
    assert x.grad.tolist() == [0.5, -2.0, 6.0]


def test_gradients_take_e5m2_unless_said_otherwise():
    x = leaf(1.0, 1.0, 1.0)
    quantize_gradient(x).backward(torch.tensor([1.0, 1.1, 1.2]))  # two mantissa bits: 1, 1.25
    assert x.grad.tolist() == [1.0, 1.0, 1.25]


def test_the_scale_of_a_gradient_is_the_gradients_own(e2m1):
    x = leaf(1.0, 1.0)
    quantize_gradient(x, e2m1).backward(torch.tensor([6e-6, 5.2e-6]))
    scale = Recipe(format=e2m1).scale_of(torch.tensor([6e-6])).item()
    assert x.grad.tolist() == e2m1.quantize(torch.tensor([6e-6, 5.2e-6]) * scale).div(scale).tolist()
    assert x.grad[0].item() == pytest.approx(6e-6, rel=0.15)


def test_a_second_derivative_passes_a_quantized_gradient_straight_through(e2m1):
    x = leaf(1.0, 2.0)
    loss = quantize_gradient(x, e2m1, granularity="none").square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert gradient.tolist() == [2.0, 4.0]
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert second.tolist() == [2.0, 2.0]


def test_stochastic_rounding_is_unbiased_and_repeats_with_its_generator(e2m1):
    def rounded(seed):
        generator = torch.Generator().manual_seed(seed)
        return quantize_ste(x, e2m1, granularity="none", rounding="stochastic", generator=generator)

    x = torch.full((20_000,), 4.5)  # between 4 and 6
    assert torch.equal(rounded(1), rounded(1))
    assert not torch.equal(rounded(1), rounded(2))
    assert rounded(1).mean().item() == pytest.approx(4.5, abs=4 * 2 * (0.25 * 0.75 / 20_000) ** 0.5)


def test_a_stochastic_gradient_draws_when_it_is_asked_for_not_in_the_order_of_the_backward_pass(e2m1):
    def gradients(order):
        generator = torch.Generator().manual_seed(0)
        options = {"granularity": "none", "rounding": "stochastic", "generator": generator}
        leaves = [torch.ones(50, requires_grad=True) for _ in range(2)]
        outputs = [quantize_gradient(one, e2m1, **options) for one in leaves]
        for index in order:
            outputs[index].backward(torch.full((50,), 4.5))
        return torch.stack([one.grad for one in leaves])

    assert torch.equal(gradients((0, 1)), gradients((1, 0)))
    assert not torch.equal(*gradients((0, 1)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scale_mode": "delayed"}, "remembers earlier tensors, a function cannot; use 'current'"),
        ({"scale_mode": "initial"}, "remembers earlier tensors"),
        ({"rounding": "stochastic"}, r"needs a torch\.Generator"),
        ({"generator": torch.Generator()}, "a generator is for rounding='stochastic', not 'nearest_even'"),
        ({"granularity": "row"}, "granularity='row'"),
    ],
)
@pytest.mark.parametrize("function", [quantize_ste, quantize_gradient])
def test_what_cannot_be_is_refused(e2m1, function, options, reason):
    with pytest.raises(ValueError, match=reason):
        function(torch.ones(2), e2m1, **options)


def test_a_recipe_takes_no_further_options(e2m1):
    recipe = Recipe(format=e2m1, granularity="none")
    assert quantize_ste(torch.tensor([0.7]), recipe).tolist() == [0.5]
    with pytest.raises(ValueError, match="a Recipe says everything; put margin into it"):
        quantize_ste(torch.ones(2), recipe, margin=2.0)


def test_a_gradient_has_no_gradient_to_clip(e2m1):
    with pytest.raises(ValueError, match="leave it out"):
        quantize_gradient(torch.ones(2), e2m1, clip_gradient=True)


@pytest.mark.parametrize("function", [quantize_ste, quantize_gradient])
def test_an_option_that_there_is_not_is_refused_by_name(e2m1, function):
    with pytest.raises(ValueError, match=r"'granularty' is no option .* did you mean 'granularity'"):
        function(torch.ones(2), e2m1, granularty="block")


# --- transforms of torch.func -------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_a_mapped_quantization_is_that_of_each_sample_alone(e2m1, granularity):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [9.0], [0.1]])
    found = torch.func.vmap(lambda one: quantize_ste(one, e2m1, granularity=granularity))(x)
    assert torch.equal(found, torch.stack([quantize_ste(one, e2m1, granularity=granularity) for one in x]))


def test_gradients_of_samples_are_those_of_one_after_the_other(e2m1):
    def loss(x):
        seen = quantize_ste(x, e2m1, granularity="none", clip_gradient=True)
        return quantize_gradient(seen, e2m1, granularity="none").square().sum()

    x = torch.tensor([[0.7, -2.4, 5.1], [100.0, 0.1, -1.1]])
    found = torch.func.vmap(torch.func.grad(loss))(x)
    assert found.tolist() == [[1.0, -4.0, 6.0], [0.0, 0.0, -2.0]]  # 2*6 = 12 saturates at 6
