"""The tally: the loop in C beside torch, codes from step to step, and what happens when formats change."""

import math
import types
import weakref

import attrs
import numpy as np
import pytest
import torch

from altgrad_core import native
from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors import native_tally, tally
from altgrad_monitors.codes import CodeBook, book_of, codes
from altgrad_monitors.plan import Room, plan_of

EIGHTHS = Format(name="EIGHTHS", bits=4, values=[rung / 8 for rung in range(-7, 8)])
WARPED = Format(
    name="WARPED",
    bits=8,
    values=sorted({0.0, *(s * 2.0**e * m for s in (-1, 1) for e in range(-6, 3) for m in (1, 1.25, 1.625))}),
)
WIDE = Format(name="WIDE", bits=16, values=[rung / 64 for rung in range(-63, 64)])
ONE_SIDED = Format(name="ONE_SIDED", bits=8, values=[float(rung) for rung in range(256)])
EVERYTHING = {"flips", "stall", "descent"}
SHAPES = {"a": (37, 83), "b": (300, 301), "c": (1, 1), "d": (256,)}


def weight(value, format=EIGHTHS, scale=1.0, layer="layer"):
    scale = scale if isinstance(scale, torch.Tensor) else torch.tensor(scale)
    return Weight(value=value, layer=layer, format=format, scale=scale)


class Updates(dict):
    """Intended updates that nobody recorded: the actual ones."""

    def recorded(self, name):
        return None


@pytest.fixture
def drawn():
    """Return a function that makes a step of random weights, with zeros and NaN among everything."""
    generator = torch.Generator().manual_seed(3)

    def normal(shape, spread=1.0, zeros=0.0):
        values = torch.randn(shape, generator=generator) * spread
        return values.masked_fill_(torch.rand(shape, generator=generator) < zeros, 0.0)

    def draw(format=EIGHTHS, scale=None, shapes=SHAPES, nan=True, **more):
        before = {name: normal(shape, 0.3) for name, shape in shapes.items()}
        intended = {name: normal(shape, 0.05, zeros=0.2) for name, shape in shapes.items()}
        after = {name: before[name] + intended[name] * (normal(shape) > 0) for name, shape in shapes.items()}
        if nan:
            before["a"][3, 5] = after["a"][3, 5] = after["a"][0, 0] = after["b"][299, 300] = math.nan
        scales = {name: torch.tensor(1.0) if scale is None else scale(before[name]) for name in shapes}
        gradients = {name: normal(shape, zeros=0.3) for name, shape in shapes.items()}
        return Step(
            index=1,
            loss=torch.tensor(1.0),
            weights={name: weight(after[name], format, scales[name], name) for name in shapes},
            gradients=gradients,
            before=before,
            **{"intended": intended, **more},
        )

    return draw


def both_ways(step, wanted=EVERYTHING, recode=False):
    """Return the tally and codes by torch, and by the loop in C."""
    before = {name: _codes(one, step.before[name]) for name, one in step.weights.items()}
    now = {name: _codes(one, one.value) for name, one in step.weights.items()}
    kept = {name: torch.zeros_like(one) if recode else one.clone() for name, one in before.items()}
    written = {name: torch.zeros_like(one) for name, one in now.items()}
    plan = planned(step, kept, written, wanted=wanted, recode=recode)
    in_c = in_the_loop(plan, step)
    if in_c is None:
        pytest.skip("there is no C compiler")
    in_torch = tally.tallied(plan, list(step.weights), step.gradients, before, now)
    return (in_torch, before, now), (in_c, kept, written)


def planned(step, before, now, values=None, wanted=EVERYTHING, recode=False):
    recoded = step.weights if recode else ()
    return plan_of(step, step.weights, wanted, recoded, Room(before, now, values or {}, {}))


def in_the_loop(plan, step):
    return native_tally.Table().tallied(plan, step.gradients)


def _codes(one, value):
    return codes(value.reshape(-1), one.format, tally.row_of(one.scale))


def column(found, name):
    return tally.columns_of(found.table)[name]


def counts(found):
    return found.table[:, :5]


def assert_close(in_c, in_torch):
    """Sums of float64 numbers; of what is lost the loop adds up float32 ones, one at most for each update."""
    lost = (column(found, "lost") / column(found, "updates").clamp(min=1) for found in (in_c, in_torch))
    torch.testing.assert_close(*lost, rtol=0, atol=1e-6, equal_nan=True)
    products = (found.table[:, 6:] for found in (in_c, in_torch))
    torch.testing.assert_close(*products, rtol=1e-11, atol=1e-300, equal_nan=True)


def assert_equal(one, other):
    (in_torch, *codes_in_torch), (in_c, *codes_in_c) = one, other
    assert list(in_c.names) == list(in_torch.names)
    assert torch.equal(counts(in_c), counts(in_torch))
    assert_close(in_c, in_torch)
    for ours, theirs in zip(codes_in_torch, codes_in_c, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def per_row(value):
    return (torch.arange(1.0, value.shape[0] + 1).unsqueeze(1) / 7).expand(value.shape)


def per_element(value):
    return torch.linspace(0.3, 4.0, value.numel()).reshape(value.shape)


MATRICES = {"a": (37, 83), "b": (300, 301)}


@pytest.mark.parametrize("format", [EIGHTHS, WARPED, WIDE], ids=lambda format: format.name)
@pytest.mark.parametrize("recode", [False, True], ids=["kept", "recoded"])
def test_the_loop_counts_and_sums_what_torch_does(drawn, format, recode):
    assert_equal(*both_ways(drawn(format), recode=recode))
    assert_equal(*both_ways(drawn(format, nan=False), recode=recode))


@pytest.mark.parametrize(
    "scale", [lambda _: torch.tensor(4.0), lambda _: torch.tensor(0.3)], ids=["4", "0.3"]
)
def test_the_loop_scales_as_torch_does(drawn, scale):
    assert_equal(*both_ways(drawn(WARPED, scale)))


@pytest.mark.parametrize("scale", [per_row, per_element])
def test_the_loop_takes_a_scale_for_each_row_or_element(drawn, scale):
    assert_equal(*both_ways(drawn(WARPED, scale, MATRICES), recode=True))


def test_the_loop_counts_updates_in_rungs_as_torch_does(drawn):
    counts = {name: (torch.tensor(1), torch.tensor(2)) for name in ("a", "c")}
    assert_equal(*both_ways(drawn(WARPED, intended_in_rungs=True, counts=counts)))
    then = {"a": torch.tensor(2.0), "c": torch.tensor(0.5)}
    assert_equal(*both_ways(drawn(WARPED, intended_in_rungs=True, counts=counts, scales_before=then)))


def test_the_loop_takes_the_actual_update_where_no_other_is_recorded(drawn):
    step = drawn(WARPED)
    actual = {name: one.value - step.before[name] for name, one in step.weights.items()}
    lazy, given = (
        Step(
            index=1, loss=step.loss, weights=step.weights, gradients=step.gradients,
            before=step.before, intended=kind(actual),
        )
        for kind in (Updates, dict)
    )  # fmt: skip
    (_, _, _), (one, *_) = both_ways(lazy)
    (expected, _, _), (other, *_) = both_ways(given)
    assert torch.equal(counts(one), counts(other))
    torch.testing.assert_close(one.table, other.table, rtol=0, atol=0, equal_nan=True)
    assert_close(one, expected)


@pytest.mark.parametrize("wanted", [{"flips"}, {"stall"}, {"descent"}], ids=lambda wanted: next(iter(wanted)))
def test_only_what_is_wanted_is_tallied(drawn, wanted):
    one, other = both_ways(drawn(WARPED), wanted)
    assert_equal(one, other)
    _, (found, *_) = one, other
    assert bool(column(found, "moved").any()) == (wanted == {"stall"})
    assert bool(column(found, "square").any()) == (wanted == {"descent"})


@pytest.mark.parametrize("format", ["E4M3", "E5M2", "E7M0", "E0M7", "E3M2", "E5M10"])
def test_the_loop_counts_as_torch_does_in_formats_by_arithmetic(drawn, format):
    exmy = pytest.importorskip("altgrad_formats.exmy", reason="formats by arithmetic are altgrad-formats'")
    made = exmy.ExMy(*(int(part) for part in format[1:].split("M")))
    assert_equal(*both_ways(drawn(made, lambda _: torch.tensor(0.5)), recode=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_do_not_depend_on_the_number_of_threads(drawn, threads):
    step, before = drawn(WARPED, nan=False), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, (found, *_) = both_ways(step)
    finally:
        torch.set_num_threads(before)
    _, (alone, *_) = both_ways(step)
    assert torch.equal(found.table, alone.table)


def test_counts_agree_with_numpy(drawn):
    step = drawn(EIGHTHS, nan=False)
    (found, *_), _ = both_ways(step)
    now, old, gradient, aim = (
        x["b"].double().numpy()
        for x in ({"b": step.weights["b"].value}, step.before, step.gradients, step.intended)
    )
    code, code_before = (np.clip(np.rint(x * 8), -7, 7) for x in (now, old))  # ties to even
    flipped, updated, moved = code != code_before, gradient != 0, now != old
    row = found.table[1, :5].tolist()
    assert row == [
        *(flipped.sum(), updated.sum(), (flipped & updated).sum()),
        *((moved & ~flipped).sum(), moved.sum()),
    ]
    lost = ((1 - np.minimum(np.abs(aim) * 8, 1)) * updated).sum()
    assert found.table[1, 5:].tolist() == pytest.approx(
        [lost, (aim * (now - old)).sum(), (aim**2).sum()], rel=1e-6
    )


def test_weights_that_are_no_plain_rows_of_float32_take_the_way_through_torch(drawn):
    step = drawn(WARPED, shapes={"a": (37, 83)}, nan=False)
    name, one = "a", step.weights["a"]
    turned = weight(one.value.T.contiguous().T, WARPED, one.scale)
    odd = Step(
        index=1, loss=step.loss, weights={name: turned}, gradients=step.gradients,
        before=step.before, intended=step.intended,
    )  # fmt: skip
    run = Run(step.before, WARPED)
    straight, bent = (tallied(run, seen) for seen in (step, odd))
    assert torch.equal(counts(straight), counts(bent))
    kept = {name: _codes(turned, step.before[name])}
    assert in_the_loop(planned(odd, kept, kept), odd) is None


# --- the code book -----------------------------------------------------------------------------------


class Run(types.SimpleNamespace):
    """What the code book uses of a run; hashable by identity."""

    __hash__ = object.__hash__
    step = 0

    def __init__(self, values, format=EIGHTHS):
        super().__init__(values=values, format=format, regridded=set())

    def weights(self):
        return {name: weight(value, self.format) for name, value in self.values.items()}


def tallied(run, *steps):
    book = CodeBook(run)
    book.wanted = EVERYTHING
    return [book.tally(step) for step in steps][-1]


def stepped(index, values, format=EIGHTHS, before=None, scale=1.0):
    value = torch.tensor(values)
    return Step(
        index=index,
        loss=torch.tensor(1.0),
        weights={"a": weight(value, format, scale)},
        gradients={"a": torch.ones_like(value)},
        before={} if before is None else {"a": torch.tensor(before)},
        intended={},
    )


def flips(tally):
    return column(tally, "flips").tolist()


def test_codes_are_kept_from_step_to_step_in_one_byte_a_weight():
    run = Run({"a": torch.zeros(3)})
    book = book_of(run, "flips")
    kept = book.kept.codes["a"]
    assert kept.dtype == torch.int8
    assert flips(book.tally(stepped(1, [0.125, 0.0, 0.0]))) == [1]
    assert flips(book.tally(stepped(2, [0.125, 0.25, 0.5]))) == [2]
    if native_tally._loops() is not None:
        assert book.kept.codes["a"].data_ptr() == kept.data_ptr()


def test_a_step_is_tallied_once_however_many_ask():
    book = book_of(Run({"a": torch.zeros(2)}), "flips")
    step = stepped(1, [0.125, 0.5])
    assert book.tally(step) is book.tally(step)


def test_both_codes_are_there_for_who_asked_at_the_start():
    run = Run({"a": torch.zeros(2)})
    book_of(run, "stall")
    found = book_of(run).flips(stepped(1, [0.25, -0.125]))["a"]
    assert (found.before.tolist(), found.now.tolist()) == ([0, 0], [2, -1])
    assert (int(found.flips), int(found.updates), int(found.flips_of_updated)) == (2, 2, 2)


def test_codes_before_the_step_are_refused_to_who_did_not():
    book = book_of(Run({"a": torch.zeros(2)}), "flips")
    with pytest.raises(RuntimeError, match=r"start with book_of\(run\)"):
        book.flips(stepped(1, [0.25, 0.0]))


def test_a_weight_in_another_format_is_compared_with_itself_before_the_step():
    run = Run({"a": torch.tensor([0.125, 0.5])})
    switched = stepped(1, [0.25, 0.5], WIDE, before=[0.125, 0.5])
    book, run.regridded = book_of(run, "flips"), {"a"}
    assert flips(book.tally(switched)) == [1]
    run.regridded = set()
    assert flips(book.tally(stepped(2, [0.25, 0.25], WIDE))) == [1]


def test_what_an_action_does_to_a_scale_and_its_weight_is_no_flip():
    run = Run({"a": torch.tensor([0.125, 0.5, 0.25])})
    book, run.regridded = book_of(run, "flips"), {"a"}
    snapped = [0.25, 0.5, 0.25]  # under half the scale, whose grid begins at 1/4
    adjusted = left_out(1, [0.25, 0.5, 0.5], before=snapped, scale=0.5, scale_before=0.5)
    assert flips(book.tally(adjusted)) == [1]
    run.regridded = set()
    assert flips(book.tally(stepped(2, [0.25, 0.75, 0.5], scale=0.5))) == [1]


def test_without_its_values_before_it_starts_anew():
    book = book_of(Run({"a": torch.tensor([0.125, 0.5])}), "flips")
    assert flips(book.tally(stepped(1, [0.25, 0.75], WIDE))) == [0]
    assert flips(book.tally(stepped(2, [0.25, 0.5], WIDE))) == [1]


def test_a_change_of_scale_recodes_a_weight_and_its_elements_flip():
    book = book_of(Run({"a": torch.tensor([0.125, 0.25, 0.0])}), "flips")
    assert flips(book.tally(stepped(1, [0.125, 0.25, 0.0], scale=2.0))) == [2]


def test_a_weight_that_is_no_longer_quantized_is_forgotten():
    book = book_of(Run({"a": torch.zeros(2)}), "flips")
    plain = Weight(value=torch.ones(2), layer="layer")
    seen = Step(
        index=1, loss=torch.tensor(1.0), weights={"a": plain}, gradients={"a": torch.ones(2)},
        before={}, intended={},
    )  # fmt: skip
    assert list(book.tally(seen).names) == []
    assert flips(book.tally(stepped(2, [0.5, 0.5]))) == [0]


def left_out(index, values, before, scale, scale_before, format=EIGHTHS):
    """Return a step after others that nobody looked at, in which the scale moved."""
    one = stepped(index, values, format, before, scale)
    given = torch.tensor(scale_before) if isinstance(scale_before, float) else scale_before
    return attrs.evolve(one, scales_before={"a": given})


@pytest.mark.parametrize("native", [True, False], ids=["c", "torch"])
def test_a_change_of_scale_counts_the_same_where_steps_were_left_out(native, monkeypatch):
    if not native:
        monkeypatch.setattr(native_tally, "_loops", lambda: None)
    values = [0.125, 0.25, 0.0]
    followed, looked = (book_of(Run({"a": torch.tensor(values)}), "flips") for _ in range(2))
    followed.tally(stepped(1, values))
    recoded = left_out(2, values, before=values, scale=2.0, scale_before=1.0)
    assert flips(followed.tally(recoded)) == flips(looked.tally(recoded)) == [2]


def test_a_scale_that_moved_in_steps_left_out_does_not_count():
    book = book_of(Run({"a": torch.tensor([0.125, 0.25, 0.0])}), "flips")
    moved = left_out(5, [0.125, 0.25, 0.125], before=[0.125, 0.25, 0.0], scale=2.0, scale_before=2.0)
    assert flips(book.tally(moved)) == [1]


def test_the_loop_takes_scales_of_before_in_rows_as_torch_does(drawn):
    step = drawn(WARPED, per_row, shapes=MATRICES)
    then = {name: per_row(value).mT.contiguous().mT * 1.7 for name, value in step.before.items()}
    step = attrs.evolve(step, scales_before=then)
    before, now = (
        {name: torch.zeros(value.numel(), dtype=torch.int8) for name, value in then.items()} for _ in "12"
    )
    if in_the_loop(planned(step, before, now, wanted={"flips"}, recode=True), step) is None:
        pytest.skip("there is no C compiler")
    for name, value in step.before.items():
        expected = codes(value.reshape(-1), WARPED, then[name].reshape(-1))
        assert torch.equal(before[name], expected)
        assert not torch.equal(before[name], now[name])


def test_what_was_before_is_needed_only_after_steps_left_out_and_actions():
    run = Run({"a": torch.zeros(2)})
    book = book_of(run, "flips")
    assert book.needs() == ()
    run.step = 1
    assert book.needs() == ("before",)
    book.tally(stepped(1, [0.125, 0.0]))
    assert book.needs() == ()
    run.regridded.add("a")
    assert book.needs() == ("before",)


def test_rungs_beyond_a_byte_stay_distinct():
    found = codes(torch.arange(256.0), ONE_SIDED, torch.tensor(1.0))
    assert len(set(found.tolist())) == 256
    values = torch.arange(-254.0, 2.0)
    negative = Format(name="NEGATIVE", bits=8, values=values)
    assert len(set(codes(values, negative, torch.tensor(1.0)).tolist())) == 256


def test_nan_has_the_code_that_no_value_has():
    assert codes(torch.tensor([math.nan, 0.0]), EIGHTHS, torch.tensor(1.0)).tolist() == [-128, 0]
    assert codes(torch.tensor([math.nan, 0.0]), WIDE, torch.tensor(1.0)).tolist() == [-32768, 0]


def test_nothing_is_counted_behind_the_back_of_who_records(drawn):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    step = drawn(WARPED)
    kept = {name: _codes(one, step.before[name]) for name, one in step.weights.items()}
    with Recording():
        assert native.recording()
        assert in_the_loop(planned(step, kept, kept), step) is None


# --- values that the book keeps ----------------------------------------------------------------------


def updated(index, now, before=None, gradients=True, scale=1.0):
    """Return a step of two weights, of which the first alone may have a gradient."""
    values = {"a": torch.tensor(now), "b": torch.tensor(now)}
    none = {} if before is None else {name: torch.tensor(before) for name in values}
    return Step(
        index=index,
        loss=torch.tensor(1.0),
        weights={name: weight(value.clone(), scale=scale) for name, value in values.items()},
        gradients={name: torch.ones(len(now)) for name in (values if gradients else "a")},
        before=none,
        intended={},
    )


def moved(tally):
    return column(tally, "moved").tolist()


@pytest.fixture(params=["c", "torch"])
def either_way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native_tally, "_loops", lambda: None)


@pytest.fixture
def following():
    """Return a run whose updates nothing rounds, and its book, which is asked for stall in every step."""
    run = Run({"a": torch.zeros(3), "b": torch.zeros(3)})
    return run, book_of(run, "stall", every=1)


@pytest.mark.usefixtures("either_way")
def test_values_are_kept_from_step_to_step(following):
    run, book = following
    assert book.needs(updates=True) == ()
    assert moved(book.tally(updated(1, [0.125, 0.0, 0.01]))) == [2, 2]
    run.step = 1
    assert book.needs(updates=True) == ()
    second = book.tally(updated(2, [0.125, 0.25, 0.02]))
    assert moved(second) == [2, 2]
    assert column(second, "stayed").tolist() == [1, 1]
    assert column(second, "lost").tolist() == pytest.approx([1 + 0 + (1 - 0.08)] * 2, rel=1e-6)


@pytest.mark.usefixtures("either_way")
def test_a_scale_that_moves_recodes_values_that_are_kept_without_codes(following):
    _, book = following
    book.tally(updated(1, [0.125, 0.25, 0.0], before=[0.125, 0.25, 0.0]))
    assert not book.kept.codes
    assert flips(book.tally(updated(2, [0.125, 0.25, 0.0], scale=2.0))) == [2, 2]
    assert flips(book.tally(updated(3, [0.125, 0.25, 0.0], scale=2.0))) == [0, 0]


@pytest.mark.usefixtures("either_way")
def test_who_wants_both_codes_later_gets_those_of_the_values(following):
    run, book = following
    run.values = {name: torch.tensor([0.125, 0.25, 0.0]) for name in "ab"}
    book.tally(updated(1, [0.125, 0.25, 0.0], before=[0.0, 0.0, 0.0]))
    found = book_of(run).flips(updated(2, [0.25, 0.25, 0.0]))["a"]
    assert (found.before.tolist(), found.now.tolist()) == ([1, 2, 0], [2, 2, 0])


@pytest.mark.usefixtures("either_way")
def test_the_weights_of_a_step_are_not_what_is_kept_of_them(following):
    _, book = following
    seen = updated(1, [0.125, 0.0, 0.0], before=[0.0, 0.0, 0.0])
    book.tally(seen)
    seen.weights["a"].value.fill_(0.5)  # as the next step does
    assert moved(book.tally(updated(2, [0.125, 0.0, 0.0]))) == [0, 0]


@pytest.mark.usefixtures("either_way")
def test_values_of_a_weight_without_a_gradient_are_kept_too(following):
    run, book = following
    book.tally(updated(1, [0.125, 0.0, 0.0], before=[0.0, 0.0, 0.0], gradients=False))
    run.step = 1
    assert book.needs(updates=True) == ()
    assert moved(book.tally(updated(2, [0.25, 0.0, 0.0]))) == [1, 1]


def test_values_are_needed_again_after_a_step_that_was_left_out(following):
    run, book = following
    book.tally(updated(1, [0.125, 0.0, 0.0], before=[0.0, 0.0, 0.0]))
    run.step = 2
    assert book.needs(updates=True) == ("before",)
    assert moved(book.tally(updated(3, [0.5, 0.0, 0.0], before=[0.5, 0.0, 0.0]))) == [0, 0]


@pytest.mark.parametrize(
    "rounding",
    [{"storage": object()}, {"optimizer": types.SimpleNamespace(watch=False)}],
    ids=lambda one: next(iter(one)),
)
def test_where_updates_are_rounded_the_step_carries_them(rounding):
    run = Run({"a": torch.zeros(3)})
    vars(run).update(rounding)
    assert book_of(run, "stall", every=1).needs(updates=True) == ("before", "intended")


def test_values_are_not_kept_for_who_looks_now_and_then():
    run = Run({"a": torch.zeros(3), "b": torch.zeros(3)})
    book = book_of(run, "stall", every=5)
    assert book.needs(updates=True) == ("before", "intended")
    book.tally(updated(1, [0.125, 0.0, 0.01], before=[0.0, 0.0, 0.0]))
    assert book.kept.values == {}


def test_the_loop_leaves_values_where_they_are_kept(drawn):
    step = drawn(WARPED)
    expected, *_ = both_ways(step)[1]
    codes_of = {name: _codes(one, step.before[name]) for name, one in step.weights.items()}
    kept = {name: step.before[name] for name in ("a", "b")}  # over what is read
    found = in_the_loop(planned(step, codes_of, codes_of, kept), step)
    assert all(torch.equal(kept[name].isnan(), step.weights[name].value.isnan()) for name in kept)
    assert all(torch.equal(kept[name].nan_to_num(), step.weights[name].value.nan_to_num()) for name in kept)
    assert torch.equal(counts(found), counts(expected))
    torch.testing.assert_close(found.table, expected.table, rtol=0, atol=0, equal_nan=True)


def test_all_that_a_piece_of_the_loop_can_lose_is_counted():
    still = torch.zeros(4096)  # every element is lost whole
    step = Step(
        index=1, loss=torch.tensor(1.0), weights={"a": weight(still)}, gradients={"a": torch.ones(4096)},
        before={"a": still}, intended={"a": still},
    )  # fmt: skip
    (in_torch, *_), (in_c, *_) = both_ways(step)
    assert column(in_c, "lost").tolist() == column(in_torch, "lost").tolist() == [4096.0]


def scaled(index, scale, gradients):
    """Return a step of a weight that stays as it is, under some scale."""
    one = stepped(index, [0.125, 0.25, 0.0], scale=scale)
    return one if gradients else attrs.evolve(one, gradients={})


@pytest.mark.usefixtures("either_way")
def test_a_scale_that_moved_in_a_step_without_a_gradient_is_no_flip_of_the_next():
    book = book_of(Run({"a": torch.tensor([0.125, 0.25, 0.0])}), "flips")
    assert list(book.tally(scaled(1, 2.0, gradients=False)).names) == []
    assert flips(book.tally(scaled(2, 2.0, gradients=True))) == [0]


def test_values_of_a_weight_that_moved_unseen_are_taken_up_without_a_gradient_too(following):
    _, book = following
    book.tally(updated(1, [0.125, 0.0, 0.0], before=[0.0, 0.0, 0.0]))
    book.tally(updated(3, [0.5, 0.0, 0.0], before=[0.5, 0.0, 0.0], gradients=False))
    assert moved(book.tally(updated(4, [0.5, 0.125, 0.0]))) == [1, 1]


class GridRun(Run):
    """The same, whose weights live on their grids."""

    def weights(self):
        return {name: attrs.evolve(one, storage="grid") for name, one in super().weights().items()}


def test_values_are_kept_of_weights_that_an_optimizer_lands_by_itself_and_tells_nothing_of():
    run = GridRun({"a": torch.zeros(3)})
    book = book_of(run, "stall", every=1)
    assert book.needs(updates=True) == ()
    run.step = 1
    assert "before" in book.needs(updates=True)
    run.values = {"a": torch.tensor([0.125, 0.0, 0.0])}
    found = book.tally(attrs.evolve(stepped(1, [0.0] * 3), weights=run.weights()))
    assert (moved(found), book.needs(updates=True)) == ([1], ())


def test_gradients_of_weights_that_have_landed_are_let_go():
    run = GridRun({"a": torch.zeros(3)})
    run.storage = types.SimpleNamespace(rounds_at_once=True)
    book, gradient = book_of(run, "stall", every=1), torch.ones(3)
    book.onlookers({"a": gradient})
    untold, gone = {"a": torch.zeros(3)}, weakref.ref(gradient)
    book.tally(attrs.evolve(stepped(1, [0.0] * 3), weights=run.weights(), unrounded=untold))
    del gradient
    assert gone() is None
