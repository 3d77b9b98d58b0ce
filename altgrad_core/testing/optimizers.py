"""Checks that hold for every optimizer that trains here.

    from altgrad_core.testing.optimizers import check_optimizer

    def test_my_optimizer_conforms():
        check_optimizer(lambda groups: MyOptimizer(groups, lr=0.01))

The subject is a small model with a quantized Linear, a plain one and vectors, in the groups that
`altgrad_core.param_groups` makes, each with `weight_decay` 0. Choose a learning rate that trains it within
a hundred steps, and leave momentum and random numbers on: they are what goes wrong.
"""

from __future__ import annotations

import attrs

from altgrad_core.testing import optimizer_interface as interface
from altgrad_core.testing import optimizer_states as states
from altgrad_core.testing import optimizer_steps as steps
from altgrad_core.testing.expect import checking
from altgrad_core.testing.optimizer_training import Make, Training


def check_optimizer(make: Make, *, shrinks_to: float = 0.5) -> None:
    """Run every check of the optimizer contract on what `make(groups)` returns.

    shrinks_to: the share of its first value to which a hundred steps must bring a quadratic loss; more for an
    optimizer whose learning rate is small.

    Raises ConformanceError at the first check that fails.
    """
    fix = "no method may fail on ordinary groups, gradients and states"
    for check in _CHECKS:
        with checking(getattr(make, "__name__", "make"), check, fix):
            run = attrs.evolve(Training.of(make), shrinks_to=shrinks_to)
        with checking(run.name, check, fix):
            check(make, run)


_CHECKS = (
    interface.is_an_optimizer,
    steps.moves_every_parameter,
    steps.groups_have_their_own_options,
    states.resumes_to_the_bit,
    steps.schedulers_drive_it,
    interface.evaluates_a_closure,
    steps.skips_parameters_without_gradient,
    states.leaves_gradients_alone,
    states.leaves_global_random_numbers_alone,
    states.copies,
    steps.handles_sparse_gradients,
    steps.minimizes,
    interface.takes_groups_later,
    interface.clears_gradients,
    steps.trains_float64,
    steps.shows_nan,
    interface.calls_hooks,
    states.does_not_depend_on_threads,
)
