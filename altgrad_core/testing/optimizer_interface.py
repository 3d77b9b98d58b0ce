"""What torch expects of an optimizer beside its step. Each docstring completes "check that ..."."""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad_core.testing.optimizer_training import Make, Training, groups_of


def is_an_optimizer(make: Make, run: Training) -> None:
    """it is a torch.optim.Optimizer over all parameters, in the groups it was given."""
    if not isinstance(run.optimizer, torch.optim.Optimizer):
        fix = "subclass torch.optim.Optimizer, so that schedulers, hooks and checkpoints work"
        run.fail("make must return a torch.optim.Optimizer", expected="one", seen=run.name, fix=fix)
    given = [[id(one) for one in group["params"]] for group in groups_of(run.model)]
    seen = [[id(one) for one in group["params"]] for group in run.optimizer.param_groups]
    if seen != given:
        rule, fix = "param_groups must be the groups it was given", "hand them to super().__init__"
        run.fail(rule, expected=list(map(len, given)), seen=list(map(len, seen)), fix=fix)
    for group in run.optimizer.param_groups:
        missing = {"lr", *run.optimizer.defaults} - set(group)
        if missing:
            rule, fix = "every group must have every option", "pass the defaults to super().__init__"
            run.fail(rule, expected="lr and all defaults", seen=f"no {', '.join(sorted(missing))}", fix=fix)


def evaluates_a_closure(make: Make, run: Training) -> None:
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


def takes_groups_later(make: Make, run: Training) -> None:
    """add_param_group works before and after the first step."""
    for steps in (0, 3):
        late = Training.of(make, groups=slice(0, -1))
        late.steps(0, steps)
        (*_, group) = groups_of(late.model)
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


def clears_gradients(make: Make, run: Training) -> None:
    """zero_grad clears."""
    run.give_gradients(0)
    run.optimizer.zero_grad(set_to_none=False)
    zeros = all(one.grad is not None and not one.grad.any() for one in run.model.parameters())
    run.optimizer.zero_grad()
    if not zeros or any(one.grad is not None for one in run.model.parameters()):
        run.fail("zero_grad must clear", expected="zeros, then None", seen="others", fix="do not override it")


def calls_hooks(make: Make, run: Training) -> None:
    """hooks before and after a step are called."""
    calls: list[str] = []
    run.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run.steps(0, 1)
    if calls != ["before", "after"]:
        rule, fix = "step hooks must be called: grid storage is one", "define step on the class itself"
        run.fail(rule, expected="before and after, once", seen=calls, fix=fix)
