"""The loops in C against the same steps in torch, bit for bit."""

import pytest
import torch
from torch import nn

import altgrad_core as altgrad
from altgrad_core import native
from altgrad_core.format import Format
from altgrad_core.registry import UsageError
from altgrad_core.stiffness import grid_stiffness
from altgrad_optim import GridOptim, ManifoldAdamW, native_steps

SHAPES = ((40, 50), (3000,), (7,), (65, 33))
TABLE = Format(name="LOPSIDED", bits=4, values=[-8.0, -3.0, -1.0, -0.5, -0.125, 0, 0.1875, 0.25, 1, 2, 5, 6])


@pytest.fixture(autouse=True)
def loops():
    if not native_steps.available():
        pytest.skip("there is no C compiler here")


@pytest.fixture
def eagerly(monkeypatch):
    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(native_steps, "available", lambda: False)
            return function()

    return call


@pytest.fixture(params=["E4M3", "E7M0", "E0M7", "LOPSIDED"])
def format(request, table):
    """ExMy formats with their own loops where they are installed, else tables of the same values."""
    if request.param == "LOPSIDED":
        return TABLE
    try:
        return altgrad.get_format(request.param)
    except UsageError:
        return table(request.param)


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in SHAPES]
    with torch.no_grad():
        made[0][0, :4] = torch.tensor([0.0, -0.0, 1e-30, -3.0])
    return made


def trained(make, steps=6, growth=1.0, spoil=False):
    """Return the weights after some steps, each with every state tensor, and the optimizer."""
    own = weights()
    optimizer = make(own)
    generator = torch.Generator().manual_seed(7)
    for step in range(steps):
        for weight in own:
            weight.grad = growth**step * torch.randn(weight.shape, generator=generator)
            weight.grad.view(-1)[0] = torch.nan if spoil and step == 3 else 0.0
        optimizer.step()
    states = [value for weight in own for value in optimizer.state[weight].values()]
    return [*(weight.detach() for weight in own), *states], optimizer


def same(first, second):
    return all(torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("placement", ["gradient", "both", (0.0, 0.5), (-1.0, -0.5), (0, 0)])
@pytest.mark.parametrize("normalize", ["rms", "mean", "max", "none"])
def test_manifold_steps_in_c_have_the_bits_of_those_in_torch(format, placement, normalize, eagerly):
    def train():
        def make(own):
            options = {"lr": 1e-2, "weight_decay": 0.1, "placement": placement, "normalize": normalize}
            return ManifoldAdamW([{"params": own, "format": format, "scale": 3.0}], **options)

        return trained(make)[0]

    fast, slow = train(), eagerly(train)
    if normalize in ("max", "none"):
        assert same(fast, slow)
    for a, b in zip(fast, slow, strict=True):  # the norm's sum in another order, rounded to float32
        torch.testing.assert_close(a, b, rtol=2.0**-22, atol=2.0**-22 * 1e-2)


@pytest.mark.parametrize("placement", ["gradient", "update"])
@pytest.mark.parametrize("stiffness", ["ideal", "smooth", "scrambled"])
def test_the_formulas_of_others_have_the_bits_of_those_in_torch(stiffness, placement, eagerly):
    def optimizer(own):
        groups = [{"params": own, "format": "E4M3", "scale": 64.0}]
        return ManifoldAdamW(groups, stiffness=stiffness, placement=placement, normalize="none")

    pytest.importorskip("altgrad_formats")
    in_c = trained(optimizer)[0]
    assert all(map(torch.equal, in_c, eagerly(lambda: trained(optimizer)[0])))


def test_a_stiffness_given_as_a_tensor_has_the_bits_of_those_in_torch(format, eagerly):
    def stiffness(weight, format, scale):
        return grid_stiffness(weight, format, scale) * 3  # not the core's own formula: no loop knows it

    def train():
        return trained(
            lambda own: ManifoldAdamW(
                [{"params": own, "format": format, "scale": 2.0}],
                stiffness=stiffness,
                placement="both",
                normalize="max",
                max_stiffness=0.1,
            )
        )[0]

    assert same(train(), eagerly(train))


def test_a_nan_gradient_makes_its_weight_nan_and_its_only(format):
    after, _ = trained(
        lambda own: ManifoldAdamW([{"params": own, "format": format}], normalize="none"), spoil=True
    )
    assert [int(weight.isnan().sum()) for weight in after[: len(SHAPES)]] == [1] * len(SHAPES)


def quantized(own, format):
    """A model of Linears whose weights are given ones."""
    model = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in own)
    for layer, weight in zip(model, own, strict=True):
        layer.weight = nn.Parameter(weight.detach().reshape(1, -1).clone())
    altgrad.quantize_model(model, format)
    return model


@pytest.mark.parametrize("normalize", ["adam", "none"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("bound", [0.0, 2.0])
@pytest.mark.parametrize(("storage_rounding", "spoil"), [("nearest_even", True), ("stochastic", False)])
def test_grid_steps_in_c_have_the_bits_of_those_in_torch(
    format, normalize, decay, bound, storage_rounding, spoil, eagerly
):
    def train():
        model = quantized(weights(), format)
        generator = torch.Generator().manual_seed(1)
        optimizer = GridOptim(
            altgrad.param_groups(model),
            step_scale=9.5,
            normalize=normalize,
            weight_decay=decay,
            bound=bound,
            storage_rounding=storage_rounding,
            generator=generator,
        )
        optimizer.watch = True
        draws, seen = torch.Generator().manual_seed(7), []
        for step in range(8):
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=draws) * (1 if normalize == "adam" else 3)
                weight.grad.view(-1)[0] = torch.nan if spoil and step == 5 else 0.0
            optimizer.step()
            counts = [one for weight in model.parameters() for one in optimizer.counts[weight]]
            intended = [optimizer.intended[weight].clone() for weight in model.parameters()]
            seen += [optimizer.flips.clone(), optimizer.updates.clone(), *map(torch.clone, counts), *intended]
        states = [value for weight in model.parameters() for value in optimizer.state[weight].values()]
        scales = list(optimizer.scales.state_dict().values())
        return [*(weight.detach() for weight in model.parameters()), *states, *scales, *seen]

    fast, slow = train(), eagerly(train)
    assert same([x.double() for x in fast], [x.double() for x in slow])


def test_scales_move_in_this_test_file(format):
    """What the test above compares would be little if no scale moved."""
    model = quantized(weights(), format)
    optimizer = GridOptim(altgrad.param_groups(model), step_scale=9.5, normalize="adam")
    draws = torch.Generator().manual_seed(7)
    for _ in range(8):
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=draws)
        optimizer.step()
    assert int(optimizer.scales.rescales.sum()) > 0


def with_threads(count, function):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return function()
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(format):
    def train():
        return trained(lambda own: ManifoldAdamW([{"params": own, "format": format}], 0.1))[0]

    assert same(with_threads(1, train), with_threads(2, train))


@pytest.mark.parametrize("sizes", [[5000] * 6, [40_000]], ids=["a_weight_each", "one_weight_shared"])
def test_the_number_of_threads_changes_no_bit_of_weights_that_are_put_back(format, sizes):
    """Scales move, so that the loops put weights back to what they were, from room of each thread's own."""

    def train():
        generator = torch.Generator().manual_seed(3)
        model = quantized(
            [nn.Parameter(0.1 * torch.randn(size, generator=generator)) for size in sizes], format
        )
        optimizer = GridOptim(altgrad.param_groups(model), step_scale=9.5, normalize="adam")
        for _ in range(8):
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
        assert int(optimizer.scales.rescales.sum()) > 0
        return [weight.detach() for weight in model.parameters()]

    one = with_threads(1, train)
    assert all(same(one, with_threads(2, train)) for _ in range(3))


def test_the_scale_follows_weights_whose_extreme_is_negative(format, eagerly):
    def train():
        model = quantized([nn.Parameter(torch.tensor([0.01, -0.9, 0.02, -0.03]))], format)
        optimizer = GridOptim(altgrad.param_groups(model), step_scale=3.0)
        scales = []
        for _ in range(6):
            model[0].weight.grad = model[0].weight.detach().sign()  # all magnitudes shrink
            optimizer.step()
            scales.append(optimizer.scales.exponents.clone())
        return [model[0].weight.detach().clone(), *[scale.float() for scale in scales]]

    assert same(train(), eagerly(train))


@pytest.mark.parametrize("place", [0, 1500, -1])
@pytest.mark.parametrize("normalize", ["rms", "mean", "max"])
def test_a_nan_weight_spoils_the_norm_of_its_tensor_wherever_it_is(format, normalize, place):
    weight = nn.Parameter(torch.full((4096,), 0.5))
    with torch.no_grad():
        weight[place] = torch.nan
    weight.grad = torch.ones(4096)
    ManifoldAdamW([{"params": [weight], "format": format}], normalize=normalize).step()
    assert weight.isnan().all()


@pytest.mark.parametrize("granularity", [{"granularity": "channel"}, {"granularity": "block", "block": 16}])
@pytest.mark.parametrize("name", ["E0M7", "E7M0", "E4M3"])
def test_scales_of_channels_and_blocks_count_in_c_as_in_torch(name, granularity, table, eagerly):
    def train():
        model = nn.Linear(32, 2, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-0.5, 0.5, 64).view(2, 32) * torch.tensor([[1.0], [0.03]]))
        altgrad.quantize_model(model, table(name), **granularity)
        optimizer = ManifoldAdamW(altgrad.param_groups(model), 1.0, normalize="none")
        model.weight.grad = torch.ones(2, 32)
        optimizer.step()
        return [model.weight.detach()]

    assert same(train(), eagerly(train))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make", [lambda own: GridOptim(own, 9.5), ManifoldAdamW], ids=["GridOptim", "Manifold"]
)
def test_torchs_default_dtype_changes_no_bit(format, make, dtype):
    def train(own):
        groups = [{"params": own, "format": format, "scale": 16.0}]
        return make(groups)

    plain = trained(train)[0]
    try:
        torch.set_default_dtype(dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch, "randn", lambda *a, _randn=torch.randn, **k: _randn(*a, **k, dtype=torch.float32)
            )
            other = trained(train)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(plain, other)


def test_a_scale_given_in_another_dtype_is_the_same_number(format):
    def train(scale):
        return trained(lambda own: ManifoldAdamW([{"params": own, "format": format, "scale": scale}]))[0]

    plain = train(16.0)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        assert same(plain, train(torch.tensor(16, dtype=dtype)))


def test_a_counter_loaded_in_another_dtype_goes_on_counting(format):
    own = [nn.Parameter(torch.ones(8))]
    optimizer = ManifoldAdamW([{"params": own, "format": format}])
    own[0].grad = torch.ones(8)
    optimizer.step()
    optimizer.state[own[0]]["step"] = optimizer.state[own[0]]["step"].double()
    optimizer.step()
    assert optimizer.state[own[0]]["step"].item() == 2


def test_a_subclass_of_tensors_is_not_read_as_memory(format):
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    weight = nn.Parameter(two_tensor.TwoTensor(torch.ones(2000), torch.ones(2000)))
    weight.grad = two_tensor.TwoTensor(torch.ones(2000), torch.ones(2000))
    assert not native.readable(weight)
    assert native.readable(nn.Parameter(torch.ones(2000)), torch.ones(3))


def test_weights_that_the_loops_cannot_read_take_the_same_step_in_torch(format):
    def train(layout):
        own = [nn.Parameter(layout(weights()[0].detach()))]
        optimizer = ManifoldAdamW([{"params": own, "format": format}], normalize="none")
        own[0].grad = layout(torch.randn(40, 50, generator=torch.Generator().manual_seed(2)))
        optimizer.step()
        return own[0].detach()

    assert torch.equal(train(lambda x: x), train(lambda x: x.t().contiguous().t()))


@pytest.mark.parametrize("normalize", ["adam", "none"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_what_is_intended_for_a_weight_that_is_nan_is_the_same_in_c_and_in_torch(normalize, decay, eagerly):
    def train():
        model = quantized(weights(), TABLE)
        optimizer = GridOptim(altgrad.param_groups(model), normalize=normalize, weight_decay=decay)
        optimizer.watch = True
        with torch.no_grad():
            model[0].weight[0, 0] = torch.nan
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        return [*optimizer.intended.values()]

    fast = train()
    assert bool(fast[0].isnan().any()) == bool(decay)
    assert same(fast, eagerly(train))
