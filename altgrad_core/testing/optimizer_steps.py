"""What a step must do to the weights. Each docstring completes "check that ..."."""

from __future__ import annotations

import torch

from altgrad_core.testing.optimizer_training import (
    Make,
    Training,
    differences,
    groups_of,
    same,
    small_model,
)

_STEPS = 100  # within which the quadratic must shrink


def moves_every_parameter(make: Make, run: Training) -> None:
    """every parameter with a gradient moves."""
    before = run.weights
    after = run.steps(0, 10)
    still = [index for index, pair in enumerate(zip(before, after, strict=True)) if torch.equal(*pair)]
    if still:
        names = [name for name, _ in run.model.named_parameters()]
        fix = "update all groups, matrices and vectors, with a format and without"
        seen = f"{', '.join(names[index] for index in still)} as before"
        run.fail("ten steps must move every parameter", expected="all moved", seen=seen, fix=fix)


def groups_have_their_own_options(make: Make, run: Training) -> None:
    """a group's own lr counts for it, and only for it."""
    for index in range(len(groups_of(run.model))):
        model = small_model(torch.float32, 12)
        groups = groups_of(model)
        groups[index]["lr"] = 0.0
        other = Training(model, make(groups))
        before = [one.detach().clone() for one in groups[index]["params"]]
        others = [one for group in groups if group is not groups[index] for one in group["params"]]
        others_before = [one.detach().clone() for one in others]
        other.steps(0, 3)
        if not same(before, groups[index]["params"]):
            seen = differences(before, groups[index]["params"])
            rule, fix = "a group whose lr is 0 must not move", 'read group["lr"], not self.defaults["lr"]'
            run.fail(rule, expected="the weights as before", seen=seen, fix=fix, given=f"group {index}")
        if same(others_before, others):
            rule, fix = "the lr of one group must not stop the others", "read each group's own options"
            run.fail(rule, expected="other groups move", seen="none does", fix=fix, given=f"group {index}")


def schedulers_drive_it(make: Make, run: Training) -> None:
    """a scheduler drives it: at a learning rate of 0 nothing moves."""
    run.steps(0, 2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, float)  # the factors 0, 1, 2, ...
    before = run.weights
    after = run.steps(2, 3)
    if not same(before, after):
        rule, fix = (
            "at lr 0 nothing must move",
            'multiply every update by group["lr"]; weight_decay is 0 here',
        )
        run.fail(rule, expected="the weights as before", seen=differences(before, after), fix=fix)
    scheduler.step()
    if same(before, run.steps(5, 3)):
        rule, fix = "when lr comes back, weights must move again", 'read group["lr"] in every step'
        run.fail(rule, expected="weights that move", seen="none does", fix=fix)


def skips_parameters_without_gradient(make: Make, run: Training) -> None:
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
        if not same(before, skipped):
            rule, fix = "a parameter whose grad is None must stay", "if parameter.grad is None: continue"
            run.fail(rule, expected="its weights as before", seen=differences(before, skipped), fix=fix)


def handles_sparse_gradients(make: Make, run: Training) -> None:
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


def minimizes(make: Make, run: Training) -> None:
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
    if not losses[-1] < run.shrinks_to * losses[0]:
        expected = f"below {run.shrinks_to} of {losses[0]:.4g} after {_STEPS} steps"
        rule, fix = "training must reduce a quadratic", "check the update's sign, and lr in `make`"
        run.fail(rule, expected=expected, seen=f"{losses[-1]:.4g}", fix=fix)


def trains_float64(make: Make, run: Training) -> None:
    """float64 parameters stay that, and train."""
    wide = Training.of(make, dtype=torch.float64)
    before = wide.weights
    after = wide.steps(0, 10)
    moved = all(
        one.dtype == torch.float64 and bool(one.isfinite().all()) and not torch.equal(one, other)
        for one, other in zip(after, before, strict=True)
    )
    if not moved:
        rule, fix = "float64 parameters must train", "make state with torch.zeros_like(parameter)"
        run.fail(rule, expected="finite float64 weights that move", seen="others", fix=fix)


def shows_nan(make: Make, run: Training) -> None:
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
