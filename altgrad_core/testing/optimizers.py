"""Checks that hold for every optimizer that trains here.

    from altgrad_core.testing.optimizers import check_optimizer

    def test_my_optimizer_conforms():
        check_optimizer(lambda groups: MyOptimizer(groups, lr=0.01))

The subject is a small model with a quantised Linear, a plain one and vectors, in the groups that
`altgrad_core.param_groups` makes, each with `weight_decay` 0. Choose a learning rate that trains it within
a hundred steps, and leave momentum and random numbers on: they are what goes wrong.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor, nn

from altgrad_core.format import Format
from altgrad_core.groups import GEOMETRY_KEYS, param_groups
from altgrad_core.rules import Rule
from altgrad_core.surgery import quantize_model
from altgrad_core.testing import ConformanceError
from altgrad_core.testing.expect import fail, global_random_states

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

_FORMAT = Format(name="CONFORMANCE", bits=8, values=[k / 128 for k in range(-127, 128)])
_STEPS = 100  # within which the quadratic must shrink
_SHRINKS_TO = 0.5  # of its first value
_PARALLEL = 300  # width from which torch's CPU kernels use a second thread


def check_optimizer(make: Make) -> None:
    """Run every check of the optimizer contract on what `make(groups)` returns.

    Raises ConformanceError at the first check that fails.
    """
    for check in _CHECKS:
        name, rule = getattr(make, "__name__", "make"), f"while checking that {check.__doc__}"
        try:
            run = _Run.of(make)
            name = run.name
            check(make, run)
        except ConformanceError:
            raise
        except Exception as error:
            fix = "no method may fail on ordinary groups, gradients and states"
            message = f"{name}: {rule}\n  seen: {type(error).__name__}: {error}\n  fix: {fix}"
            raise ConformanceError(message) from error


@attrs.frozen
class _Run:
    """A model in training, with gradients that depend on the step alone."""

    model: nn.Module
    optimizer: Any

    @classmethod
    def of(
        cls, make: Make, *, dtype: torch.dtype = torch.float32, width: int = 12, groups: slice = slice(None)
    ) -> _Run:
        model = _model(dtype, width)
        return cls(model, make(_groups(model)[groups]))

    @property
    def name(self) -> str:
        return type(self.optimizer).__name__

    @property
    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def give_gradients(self, step: int) -> None:
        for index, parameter in enumerate(self.model.parameters()):
            generator = torch.Generator().manual_seed(1000 * step + index)
            draws = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = draws.to(parameter.dtype)

    def steps(self, first: int, count: int) -> list[Tensor]:
        for step in range(first, first + count):
            self.give_gradients(step)
            self.optimizer.step()
        return self.weights

    def fail(self, rule: str, *, expected: object, seen: object, fix: str, given: str = "") -> NoReturn:
        fail(self.name, rule, given=given or "the model of the kit", expected=expected, seen=seen, fix=fix)


def _model(dtype: torch.dtype, width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, width)).to(dtype)
    return quantize_model(model, rules=[Rule("0", _FORMAT)])


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{**group, "weight_decay": 0.0} for group in param_groups(model)]


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def _differences(first: Sequence[Tensor], second: Sequence[Tensor]) -> str:
    count = sum(int((one != other).sum()) for one, other in zip(first, second, strict=True))
    return f"{count} weights that differ"


# --- the checks: each docstring completes "check that ..." ---------------------------------------------


def _is_an_optimizer(make: Make, run: _Run) -> None:
    """it is a torch.optim.Optimizer over all parameters, in the groups it was given."""
    if not isinstance(run.optimizer, torch.optim.Optimizer):
        fix = "subclass torch.optim.Optimizer, so that schedulers, hooks and checkpoints work"
        run.fail("make must return a torch.optim.Optimizer", expected="one", seen=run.name, fix=fix)
    given = [[id(one) for one in group["params"]] for group in _groups(run.model)]
    seen = [[id(one) for one in group["params"]] for group in run.optimizer.param_groups]
    if seen != given:
        rule, fix = "param_groups must be the groups it was given", "hand them to super().__init__"
        run.fail(rule, expected=list(map(len, given)), seen=list(map(len, seen)), fix=fix)
    for group in run.optimizer.param_groups:
        missing = {"lr", *run.optimizer.defaults} - set(group)
        if missing:
            rule, fix = "every group must have every option", "pass the defaults to super().__init__"
            run.fail(rule, expected="lr and all defaults", seen=f"no {', '.join(sorted(missing))}", fix=fix)


def _moves_every_parameter(make: Make, run: _Run) -> None:
    """every parameter with a gradient moves."""
    before = run.weights
    after = run.steps(0, 10)
    still = [index for index, pair in enumerate(zip(before, after, strict=True)) if torch.equal(*pair)]
    if still:
        names = [name for name, _ in run.model.named_parameters()]
        fix = "update all groups, matrices and vectors, with a format and without"
        seen = f"{', '.join(names[index] for index in still)} as before"
        run.fail("ten steps must move every parameter", expected="all moved", seen=seen, fix=fix)


def _groups_have_their_own_options(make: Make, run: _Run) -> None:
    """a group's own lr counts for it, and only for it."""
    for index in range(len(_groups(run.model))):
        model = _model(torch.float32, 12)
        groups = _groups(model)
        groups[index]["lr"] = 0.0
        other = _Run(model, make(groups))
        before = [one.detach().clone() for one in groups[index]["params"]]
        others = [one for group in groups if group is not groups[index] for one in group["params"]]
        others_before = [one.detach().clone() for one in others]
        other.steps(0, 3)
        if not _same(before, groups[index]["params"]):
            seen = _differences(before, groups[index]["params"])
            rule, fix = "a group whose lr is 0 must not move", 'read group["lr"], not self.defaults["lr"]'
            run.fail(rule, expected="the weights as before", seen=seen, fix=fix, given=f"group {index}")
        if _same(others_before, others):
            rule, fix = "the lr of one group must not stop the others", "read each group's own options"
            run.fail(rule, expected="other groups move", seen="none does", fix=fix, given=f"group {index}")


def _resumes_to_the_bit(make: Make, run: _Run) -> None:
    """a saved state resumes to the bit in a fresh optimizer."""
    run.steps(0, 5)
    weights = copy.deepcopy(run.model.state_dict())
    state = _read_back(run, _without_geometry(run.optimizer.state_dict()))
    expected = run.steps(5, 5)
    fresh = _Run.of(make)
    fresh.steps(50, 1)  # a history of its own, which the state must replace
    fresh.model.load_state_dict(weights)
    fresh.optimizer.load_state_dict(state)
    seen = fresh.steps(5, 5)
    if not _same(seen, expected):
        rule = "load_state_dict must resume to the bit"
        fix = "keep moments, step counts, seeds and counters in self.state, or add them to state_dict()"
        run.fail(
            rule, expected="the weights of the run that went on", seen=_differences(seen, expected), fix=fix
        )


def _without_geometry(state: dict[str, Any]) -> dict[str, Any]:
    groups = [
        {key: value for key, value in group.items() if key not in GEOMETRY_KEYS}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def _read_back(run: _Run, state: dict[str, Any]) -> Any:
    """Return a state as a file without pickled classes gives it back."""
    path = _unsavable(state, "state_dict()")
    if path:
        rule = "a state must be tensors, numbers, text, lists and tables"
        run.fail(rule, expected="such", seen=path, fix="checkpoints hold no pickled objects; save numbers")
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _unsavable(value: Any, path: str) -> str:
    """Return where something stands that no checkpoint can hold, and what it is; "" where all is well."""
    if isinstance(value, Mapping):
        found = [
            _unsavable(inner, f"{path}[{key!r}]")
            if isinstance(key, int | str)
            else f"{path} has the key {key!r}"
            for key, inner in value.items()
        ]
    elif isinstance(value, list | tuple):
        found = [_unsavable(inner, f"{path}[{index}]") for index, inner in enumerate(value)]
    else:
        known = value is None or isinstance(value, Tensor | bool | int | float | str)
        found = [] if known else [f"{path} is of type {type(value).__name__}"]
    return next(filter(None, found), "")


def _schedulers_drive_it(make: Make, run: _Run) -> None:
    """a scheduler drives it: at a learning rate of 0 nothing moves."""
    run.steps(0, 2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, float)  # the factors 0, 1, 2, ...
    before = run.weights
    after = run.steps(2, 3)
    if not _same(before, after):
        rule, fix = (
            "at lr 0 nothing must move",
            'multiply every update by group["lr"]; weight_decay is 0 here',
        )
        run.fail(rule, expected="the weights as before", seen=_differences(before, after), fix=fix)
    scheduler.step()
    if _same(before, run.steps(5, 3)):
        rule, fix = "when lr comes back, weights must move again", 'read group["lr"] in every step'
        run.fail(rule, expected="weights that move", seen="none does", fix=fix)


def _evaluates_a_closure(make: Make, run: _Run) -> None:
    """a closure is evaluated once, with gradients enabled, and its loss returned."""
    calls, loss = [], torch.tensor(3.0)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        run.give_gradients(len(calls))
        return loss

    run.steps(0, 1)
    returned = run.optimizer.step(closure)
    if calls != [True]:
        rule, fix = "step(closure) must evaluate it once", "with torch.enable_grad(): loss = closure()"
        run.fail(rule, expected="one call, gradients enabled", seen=f"gradients enabled: {calls}", fix=fix)
    if returned is not loss:
        rule, fix = "step(closure) must return the closure's loss", "return loss"
        run.fail(rule, expected=loss, seen=returned, fix=fix)
    if run.optimizer.step() is not None:
        run.fail("step() must return None", expected=None, seen="something", fix="return loss, which is None")


def _skips_parameters_without_gradient(make: Make, run: _Run) -> None:
    """parameters without a gradient stay as they are."""
    run.steps(0, 2)
    for without in range(len(run.weights) + 1):  # the last: all of them
        run.give_gradients(2)
        parameters = list(run.model.parameters())
        skipped = parameters[without : without + 1] or parameters
        for parameter in skipped:
            parameter.grad = None
        before = [one.detach().clone() for one in skipped]
        run.optimizer.step()
        if not _same(before, skipped):
            rule, fix = "a parameter whose grad is None must stay", "if parameter.grad is None: continue"
            run.fail(rule, expected="its weights as before", seen=_differences(before, skipped), fix=fix)


def _leaves_gradients_alone(make: Make, run: _Run) -> None:
    """gradients are not modified."""
    for step in range(3):
        run.give_gradients(step)
        given = [parameter.grad for parameter in run.model.parameters()]
        before = [gradient.clone() for gradient in given if gradient is not None]
        run.optimizer.step()
        after = [parameter.grad for parameter in run.model.parameters()]
        if [id(one) for one in after] != [id(one) for one in given] or not _same(before, given):  # type: ignore[arg-type]
            rule, fix = "step must not modify gradients", "g = p.grad.mul(...), never p.grad.mul_(...)"
            run.fail(rule, expected="gradients as they were given", seen="others", fix=fix)


def _leaves_global_random_numbers_alone(make: Make, run: _Run) -> None:
    """no global random state is touched."""
    run.give_gradients(0)
    before = global_random_states()
    make(_groups(_model(torch.float32, 12)))
    if global_random_states() != before:
        rule, fix = "making it must not touch global random states", "take a torch.Generator"
        run.fail(rule, expected="no trace", seen="a global generator advanced", fix=fix)
    run.optimizer.step()
    if global_random_states() != before:
        rule = "step must not touch global random states"
        fix = "altgrad_core.random_bits.uniform((seed, step, tensor), shape) draws without a state"
        run.fail(rule, expected="no trace", seen="a global generator advanced", fix=fix)


def _copies(make: Make, run: _Run) -> None:
    """a deep copy of model and optimizer trains on alike, and by itself."""
    run.steps(0, 3)
    before = run.weights
    twin = _Run(*copy.deepcopy((run.model, run.optimizer)))
    seen = twin.steps(3, 3)
    if not _same(run.weights, before):
        rule, fix = (
            "a deep copy must have weights of its own",
            "hold parameters in param_groups and self.state",
        )
        run.fail(rule, expected="the original as before", seen=_differences(run.weights, before), fix=fix)
    expected = run.steps(3, 3)
    if not _same(seen, expected):
        rule = "a deep copy must train on as the original does"
        fix = "torch copies defaults, state and param_groups only: add the rest in __getstate__"
        run.fail(rule, expected="the same weights", seen=_differences(seen, expected), fix=fix)


def _handles_sparse_gradients(make: Make, run: _Run) -> None:
    """a sparse gradient is used, or refused by a RuntimeError."""
    for index, parameter in enumerate(run.model.parameters()):
        run.give_gradients(0)
        parameter.grad = torch.ones_like(parameter).to_sparse()
        before = parameter.detach().clone()
        try:
            for _ in range(10):
                run.optimizer.step()
            seen = "nothing happened" if torch.equal(before, parameter) else ""
        except RuntimeError as error:
            seen = "" if "sparse" in str(error) else f"a RuntimeError that says {error}"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            seen = f"{type(error).__name__}: {error}"
        if seen:
            rule, fix = "a sparse gradient must be refused", 'raise RuntimeError("... sparse gradients ...")'
            run.fail(rule, expected="a RuntimeError", seen=seen, fix=fix, given=f"parameter {index}")


def _minimises(make: Make, run: _Run) -> None:
    """training reduces a quadratic."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    target = x @ torch.randn(8, 12, generator=generator)
    losses = []
    for _ in range(_STEPS):
        run.optimizer.zero_grad()
        loss = (run.model(x) - target).square().mean()
        loss.backward()
        run.optimizer.step()
        losses.append(loss.item())
    if not losses[-1] < _SHRINKS_TO * losses[0]:
        expected = f"below {_SHRINKS_TO} of {losses[0]:.4g} after {_STEPS} steps"
        rule, fix = "training must reduce a quadratic", "check the update's sign, and lr in `make`"
        run.fail(rule, expected=expected, seen=f"{losses[-1]:.4g}", fix=fix)


def _takes_groups_later(make: Make, run: _Run) -> None:
    """add_param_group works before and after the first step."""
    for steps in (0, 3):
        late = _Run.of(make, groups=slice(0, -1))
        late.steps(0, steps)
        (*_, group) = _groups(late.model)
        before = [one.detach().clone() for one in group["params"]]
        late.optimizer.add_param_group(group)
        late.steps(steps, 5)
        if any(torch.equal(*pair) for pair in zip(before, group["params"], strict=True)):
            rule, fix = (
                "a group added later must train too",
                "start a parameter's state when it is first seen",
            )
            run.fail(
                rule, expected="weights that move", seen="some stay", fix=fix, given=f"after {steps} steps"
            )


def _clears_gradients(make: Make, run: _Run) -> None:
    """zero_grad clears."""
    run.give_gradients(0)
    run.optimizer.zero_grad(set_to_none=False)
    zeros = all(one.grad is not None and not one.grad.any() for one in run.model.parameters())
    run.optimizer.zero_grad()
    if not zeros or any(one.grad is not None for one in run.model.parameters()):
        run.fail("zero_grad must clear", expected="zeros, then None", seen="others", fix="do not override it")


def _trains_float64(make: Make, run: _Run) -> None:
    """float64 parameters stay that, and train."""
    wide = _Run.of(make, dtype=torch.float64)
    before = wide.weights
    after = wide.steps(0, 10)
    moved = all(
        one.dtype == torch.float64 and bool(one.isfinite().all()) and not torch.equal(one, other)
        for one, other in zip(after, before, strict=True)
    )
    if not moved:
        rule, fix = "float64 parameters must train", "make state with torch.zeros_like(parameter)"
        run.fail(rule, expected="finite float64 weights that move", seen="others", fix=fix)


def _shows_nan(make: Make, run: _Run) -> None:
    """a NaN gradient makes its weight NaN."""
    run.steps(0, 1)
    run.give_gradients(1)
    for parameter in run.model.parameters():
        parameter.grad.flatten()[0] = torch.nan  # type: ignore[union-attr]
    run.optimizer.step()
    hidden = [name for name, one in run.model.named_parameters() if not one.flatten()[0].isnan()]
    if hidden:
        rule, fix = "a NaN gradient must be seen", "clamp and casts to integers hide NaN; let it through"
        run.fail(rule, expected="NaN weights", seen=f"none in {', '.join(hidden)}", fix=fix)


def _calls_hooks(make: Make, run: _Run) -> None:
    """hooks before and after a step are called."""
    calls: list[str] = []
    run.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run.steps(0, 1)
    if calls != ["before", "after"]:
        rule, fix = "step hooks must be called: grid storage is one", "define step on the class itself"
        run.fail(rule, expected="before and after, once", seen=calls, fix=fix)


def _does_not_depend_on_threads(make: Make, run: _Run) -> None:
    """one thread and two give the same bits."""
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            seen.append(_Run.of(make, width=_PARALLEL).steps(0, 3))
    finally:
        torch.set_num_threads(threads)
    if not _same(*seen):
        rule, fix = "threads must not change bits", "key random numbers by element; reduce in a fixed order"
        run.fail(
            rule, expected="the same weights", seen=_differences(*seen), fix=fix, given="1 and 2 threads"
        )


_CHECKS = (
    _is_an_optimizer,
    _moves_every_parameter,
    _groups_have_their_own_options,
    _resumes_to_the_bit,
    _schedulers_drive_it,
    _evaluates_a_closure,
    _skips_parameters_without_gradient,
    _leaves_gradients_alone,
    _leaves_global_random_numbers_alone,
    _copies,
    _handles_sparse_gradients,
    _minimises,
    _takes_groups_later,
    _clears_gradients,
    _trains_float64,
    _shows_nan,
    _calls_hooks,
    _does_not_depend_on_threads,
)
