"""What has been done to a run is told; streams are given back as they were, whoever has drawn from them."""

import contextlib
import random
import types

import numpy
import pytest
import torch
from torch import nn

import altgrad_core as altgrad
from altgrad_core.quantizer import quantizer_of
from altgrad_core.untouched import Untouched, streams_kept

CPU = torch.device("cpu")


@pytest.fixture
def run(table):
    """A run of two weights that has taken a step, as far as `Untouched` looks."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Dropout(), nn.Linear(4, 2, bias=False))
    altgrad.quantize_model(model, table("E4M3"))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    trained = dict(model.named_parameters())
    return types.SimpleNamespace(
        model=model, modules=list(model.modules()), trained=trained, optimizer=optimizer, device=CPU
    )


CHANGES = {
    "wrote to 2.weight in place": lambda run: run.trained["2.weight"].detach().add_(1),
    "wrote to the gradient of 0.weight": lambda run: run.trained["0.weight"].grad.zero_(),
    "wrote to the optimizer's exp_avg of 0.weight": lambda run: run.optimizer.state[run.trained["0.weight"]][
        "exp_avg"
    ].zero_(),
    "wrote to the scale of 2.weight": lambda run: quantizer_of(run.trained["2.weight"]).scale.mul_(2),
    "changed the training mode": lambda run: run.model[1].eval(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_been_done_to_a_run_is_told(run, what):
    held = Untouched(run)
    assert held.changed() is None
    CHANGES[what](run)
    assert held.changed().startswith(what)


@pytest.mark.parametrize(
    ("written", "what"), [("loss", "wrote to the loss"), ("before", "wrote to 0.weight as it was before")]
)
def test_what_has_been_done_to_a_step_that_was_shown_is_told(run, written, what):
    shown = {"loss": torch.tensor(1.0), "before": torch.ones(4, 4)}
    step = types.SimpleNamespace(loss=shown["loss"], before={"0.weight": shown["before"]})
    held = Untouched(run, step)
    assert held.changed() is None
    shown[written].zero_()
    assert held.changed().startswith(what)


def test_a_scale_of_another_shape_is_another_one(run):
    held, quantizer = Untouched(run), quantizer_of(run.trained["0.weight"])
    quantizer.scale = quantizer.scale.reshape(1)
    assert held.changed().startswith("wrote to the scale of 0.weight")


def test_what_is_given_back_has_not_been_changed(run):
    held, scale = Untouched(run), quantizer_of(run.trained["0.weight"]).scale
    scale.mul_(2).mul_(0.5)
    run.model.eval().train()
    assert held.changed() is None
    scale.mul_(2)
    assert held.changed() is not None


@pytest.fixture(autouse=True)
def own_streams():
    """Begin with streams of these tests' own, and give those of before back."""
    before = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    yield
    random.setstate(before[0]), numpy.random.set_state(before[1]), torch.random.set_rng_state(before[2])


def draws():
    """Return what the streams give next, and leave them as they are."""
    numbers, state = [], numpy.random.get_state(legacy=False)
    numbers += [float(one) for one in (*numpy.random.normal(size=3), *numpy.random.rand(2))]
    numpy.random.set_state(state)
    with torch.random.fork_rng([]):
        numbers.append(float(torch.rand(())))
    state = random.getstate()
    numbers += [random.gauss(0, 1), random.random()]
    random.setstate(state)
    return numbers


def draw_in_all():
    random.random(), numpy.random.rand(), torch.rand(())


def normal():
    numpy.random.normal()


def seed():
    numpy.random.seed(5)


def nothing():
    pass


@pytest.mark.parametrize("drawn", [nothing, draw_in_all, normal, seed], ids=lambda one: one.__name__)
@pytest.mark.parametrize("before", [nothing, normal, draw_in_all], ids=lambda one: one.__name__)
def test_streams_go_on_as_if_nobody_had_drawn_from_them(before, drawn):
    for _ in range(3):  # in turns with who may draw
        before()
        expected = draws()
        with streams_kept(CPU):
            drawn()
        assert draws() == expected


def test_a_second_normal_number_that_is_at_hand_is_given_back_too():
    with streams_kept(CPU):  # the state of now is known
        pass
    normal()
    normal()
    with streams_kept(CPU):  # and this, of which no second one is left
        pass
    normal()
    expected = draws()
    with streams_kept(CPU):
        normal()  # the one that is at hand: no number is drawn
    assert draws() == expected


def test_streams_kept_within_streams_kept_are_each_given_back():
    outer = draws()
    with streams_kept(CPU):
        draw_in_all()
        inner = draws()
        with streams_kept(CPU):
            draw_in_all()
        assert draws() == inner
    assert draws() == outer


def test_streams_are_given_back_by_who_fails():
    expected = draws()
    with contextlib.suppress(ZeroDivisionError), streams_kept(CPU):
        draw_in_all()
        raise ZeroDivisionError
    assert draws() == expected


def test_another_generator_of_numpy_is_kept_by_its_own_state():
    ours = numpy.random.get_bit_generator()
    numpy.random.set_bit_generator(numpy.random.PCG64(3))
    try:
        expected = draws()
        with streams_kept(CPU):
            draw_in_all()
        assert draws() == expected
    finally:
        numpy.random.set_bit_generator(ours)
