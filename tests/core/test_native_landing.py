"""Weights landed by the loop in C against the same rounding in torch, bit for bit."""

import pytest
import torch
from torch import nn

from altgrad_core import native, native_landing
from altgrad_core.format import Format
from altgrad_core.grid_scales import GridScales
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import quantize_model

LOPSIDED = Format(name="LOPSIDED", bits=4, values=[-8.0, -3.0, -1.0, -0.5, -0.125, 0, 0.1875, 0.25, 1, 5, 6])


@pytest.fixture(autouse=True)
def loops():
    if native_landing._loops() is None:
        pytest.skip("there is no C compiler here")


@pytest.fixture
def in_torch(monkeypatch):
    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(native_landing, "land", lambda *_: (set(), {}))
            return function()

    return call


@pytest.fixture(params=["E4M3", "E7M0", "E0M7", "LOPSIDED"])
def format(request, table):
    return LOPSIDED if request.param == "LOPSIDED" else table(request.param)


def trained(format, rounding, steps=12, *, bound=0.0, scale_mode="adaptive", spoil=False):
    """Return weights and scales step by step, of weights that grow, shrink, vanish and are not a number."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 3, bias=False), nn.Linear(3, 700, bias=False))
    nn.init.zeros_(model[1].weight)
    quantize_model(model, format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    storage = store_on_grid(optimizer, rounding, generator, bound=bound, scale_mode=scale_mode)
    seen = []
    for step in range(steps):
        for weight in model.parameters():
            draws = torch.randn(weight.shape, generator=generator)
            weight.grad = draws + (30 if step == 4 else 0) + 8 * weight.detach() * (step > 6)
            weight.grad.view(-1)[1] = torch.nan if spoil and step == 9 else 0.0
        storage.watched = {weight: weight.detach().clone() for weight in storage.weights[step % 2 :]}
        optimizer.step()
        seen += [storage.intended[weight].clone() for weight in storage.watched]
        seen += [*(weight.detach().clone() for weight in model.parameters())]
        seen += [one.clone() for one in storage.scales.state_dict().values()]
    return seen, storage


def same(first, second):
    return all(
        torch.equal(a.double().nan_to_num(9e9), b.double().nan_to_num(9e9))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("options", [{}, {"bound": 2.0}, {"scale_mode": "initial"}, {"spoil": True}], ids=str)
def test_weights_land_with_the_bits_of_torch(format, rounding, options, in_torch):
    (fast, storage), (slow, _) = (
        trained(format, rounding, **options),
        in_torch(lambda: trained(format, rounding, **options)),
    )
    assert same(fast, slow)
    moves = int(storage.scales.rescales.sum())
    assert moves > 0 or options.get("scale_mode") == "initial", "a scale has moved on the way"


def test_the_number_of_threads_changes_no_bit(format):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = trained(format, "stochastic", 5)
        torch.set_num_threads(2)
        assert same(one, trained(format, "stochastic", 5)[0])
    finally:
        torch.set_num_threads(before)


def test_a_weight_that_does_not_lie_in_one_piece_is_rounded_in_torch(format):
    model = nn.Sequential(nn.Linear(40, 64, bias=False))
    model[0].weight = nn.Parameter(torch.randn(40, 64, generator=torch.Generator().manual_seed(3)).t())
    quantize_model(model, format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    storage = store_on_grid(optimizer)
    model[0].weight.grad = torch.full((64, 40), 0.3)
    optimizer.step()
    scaled = model[0].weight.detach() * storage.scales.scales[0]
    assert torch.isin(scaled, format.values).all()


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_a_weight_of_many_pieces_lands_with_the_bits_of_torch(format, rounding, in_torch):
    def train():
        torch.manual_seed(0)
        model = nn.Linear(300, 300, bias=False)
        quantize_model(model, format)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        store_on_grid(optimizer, rounding, torch.Generator().manual_seed(1))
        for _ in range(2):
            model.weight.grad = torch.randn(300, 300)
            optimizer.step()
        return [model.weight.detach()]

    assert same(train(), in_torch(train))


def test_either_limit_of_a_lopsided_format_holds(in_torch):
    lopsided = Format(name="DEEP", bits=4, values=[-8.0, -4.0, -1.0, -0.5, 0.0, 0.5, 1.0, 8.0])

    def train(sign):
        model = nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 4096).view(64, 64) * 0.1)
        quantize_model(model, lopsided)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        store_on_grid(optimizer, bound=1.5, scale_mode="initial")
        model.weight.grad = sign * torch.full((64, 64), 0.12)
        optimizer.step()
        return [model.weight.detach()]

    for sign in (1, -1):
        assert same(train(sign), in_torch(lambda sign=sign: train(sign)))


# --- who looks on ------------------------------------------------------------------------------------

TELLS = """
#include "loops.h"
typedef struct { double before, after; int64_t elements, blocks, next; } Told;
void tell(const float *unrounded, const float *rounded, int64_t at, int32_t n, void *context) {
    Told *told = context;
    for (int32_t i = 0; i < n; i++) told->before += unrounded[i], told->after += rounded[i];
    told->elements += n;
    told->blocks += at % LANDED == 0;
    told->next = at + n;
}
"""


@pytest.fixture(scope="module")
def tells(tmp_path_factory):
    """Return the address of a C function that adds up what it is told."""
    source = tmp_path_factory.mktemp("tells") / "tells.c"
    source.write_text(TELLS)
    return native.entry(native.library(source), "tell")


@pytest.fixture
def landing():
    """Return a function that lands a step of two weights: before rounding, after it, and the storage.

    onlookers: makes them of the weights.
    """

    def land(onlookers, push=0.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 40, bias=False), nn.Linear(300, 9, bias=False))
        quantize_model(model, LOPSIDED)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        storage = store_on_grid(
            optimizer,
            "stochastic",
            torch.Generator().manual_seed(1),
            scale_mode="adaptive" if push else "initial",
        )
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape) * 0.01 + push
        storage.onlookers = onlookers(storage.weights)
        unrounded = [(weight - weight.grad).detach() for weight in storage.weights]
        optimizer.step()
        return unrounded, [weight.detach().clone() for weight in storage.weights], storage

    return land


def told():
    """Return memory for one weight's struct Told, as float64 and as integers."""
    memory = torch.zeros(5, dtype=torch.float64)
    return memory, memory.view(torch.int64)


def test_who_looks_on_is_told_each_element_before_and_after_its_rounding(tells, landing):
    memory = [told() for _ in range(4)]

    def onlookers(weights):
        rows = [[(tells, one.data_ptr()) for one, _ in memory[at : at + 2]] for at in (0, 2)]
        return [dict(zip(weights, row, strict=True)) for row in rows]

    unrounded, rounded, storage = landing(onlookers)
    for place, (sums, numbers) in enumerate(memory):
        before, after = unrounded[place % 2], rounded[place % 2]
        expected = [float(one.double().sum()) for one in (before, after)]
        assert sums[:2].tolist() == pytest.approx(expected, rel=1e-12)
        blocks = -(-before.numel() // 384)
        assert numbers[2:].tolist() == [before.numel(), blocks, before.numel()]
    assert storage.unrounded == {}


def test_who_looks_on_is_told_of_one_step_alone(tells, landing):
    sums, numbers = told()
    *_, storage = landing(lambda weights: [{weight: (tells, sums.data_ptr()) for weight in weights}])
    once = numbers.tolist()
    storage.optimizer.step()
    assert numbers.tolist() == once
    assert storage.onlookers == ()


def test_who_looks_on_may_be_another_in_each_step(tells, landing):
    memory = [told() for _ in range(3)]
    first, *others = ((tells, sums.data_ptr()) for sums, _ in memory)
    *_, storage = landing(lambda weights: [dict.fromkeys(weights, first)])
    for one in others:
        storage.onlookers = [dict.fromkeys(storage.weights, one)]
        storage.optimizer.step()
    elements = [int(numbers[2]) for _, numbers in memory]
    assert elements == [64 * 40 + 300 * 9] * 3  # once each


def test_looking_on_changes_no_bit(tells, landing):
    sums, _ = told()
    _, alone, _ = landing(lambda weights: [])
    _, watched, _ = landing(lambda weights: [{weight: (tells, sums.data_ptr()) for weight in weights}])
    same(alone, watched)


def test_a_weight_without_a_function_is_kept_as_it_was_before_its_rounding(tells, landing):
    (sums, numbers), (other, _) = told(), told()
    unrounded, _, storage = landing(
        lambda weights: [
            dict(zip(weights, [(tells, sums.data_ptr()), None], strict=True)),
            {weights[1]: (tells, other.data_ptr())},
        ]
    )
    assert numbers[2] == 64 * 40
    assert not other.any()  # of one weight all are told, or nobody
    ((weight, (kept, scale)),) = storage.unrounded.items()
    assert weight is storage.weights[1]
    assert torch.equal(kept, unrounded[1])
    assert torch.equal(scale, storage.scales.scales[1])


def test_a_weight_whose_scale_moves_is_kept_with_the_scale_it_had(tells, landing):
    sums, numbers = told()
    unrounded, _, storage = landing(
        lambda weights: [{weight: (tells, sums.data_ptr()) for weight in weights}], push=50.0
    )
    assert numbers[2] == 0
    for place, weight in enumerate(storage.weights):
        kept, scale = storage.unrounded[weight]
        assert torch.equal(kept, unrounded[place])
        assert scale > storage.scales.scales[place]


def test_in_torch_weights_are_kept_for_who_looks_on(tells, landing, in_torch):
    unrounded, _, storage = in_torch(lambda: landing(lambda weights: [dict.fromkeys(weights, (tells, 0))]))
    assert [storage.unrounded[weight][0].tolist() for weight in storage.weights] == [
        one.tolist() for one in unrounded
    ]


@pytest.mark.parametrize(("widths", "split"), [((64, 64), False), ((64, 4096), True)], ids=["like", "unlike"])
def test_threads_share_a_weight_where_one_of_them_would_have_nearly_all(widths, split):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        weights = [torch.ones(32, width) for width in widths]
        formats, ones = [LOPSIDED] * 2, [torch.tensor(1.0) for _ in widths]
        scales = GridScales(weights, formats, ones, fitted=[True] * 2, adaptive=[True] * 2, bound=0.0)
        assert native_landing._made(weights, formats, scales).split == split
    finally:
        torch.set_num_threads(threads)
