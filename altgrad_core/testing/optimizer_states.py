"""What a step may follow from and leave behind: nothing hidden. Each docstring completes "check that ..."."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch

from altgrad_core.groups import without_geometry
from altgrad_core.state_tree import pack, unpack
from altgrad_core.testing.expect import no_random_trace
from altgrad_core.testing.optimizer_training import (
    Make,
    Training,
    differences,
    groups_of,
    same,
    small_model,
)

_PARALLEL = 300  # width from which torch's CPU kernels use a second thread


def resumes_to_the_bit(make: Make, run: Training) -> None:
    """a saved state resumes to the bit in a fresh optimizer."""
    run.steps(0, 5)
    weights = copy.deepcopy(run.model.state_dict())
    state = _read_back(run, without_geometry(run.optimizer.state_dict()))
    expected = run.steps(5, 5)
    fresh = Training.of(make)
    fresh.steps(50, 1)  # a history of its own, which the state must replace
    fresh.model.load_state_dict(weights)
    fresh.optimizer.load_state_dict(state)
    seen = fresh.steps(5, 5)
    if not same(seen, expected):
        rule = "load_state_dict must resume to the bit"
        fix = "keep moments, step counts, seeds and counters in self.state, or add them to state_dict()"
        run.fail(
            rule, expected="the weights of the run that went on", seen=differences(seen, expected), fix=fix
        )


def _read_back(run: Training, state: dict[str, Any]) -> Any:
    """Return a state as a checkpoint gives it back."""
    try:
        tree, tensors = pack(state)
    except TypeError as error:
        rule, fix = "a checkpoint must hold state_dict()", "it holds no pickled objects; save numbers"
        run.fail(rule, expected="tensors, numbers, text, lists, tables", seen=f"state_dict(){error}", fix=fix)
    return unpack(json.loads(json.dumps(tree)), {path: one.detach().clone() for path, one in tensors.items()})


def copies(make: Make, run: Training) -> None:
    """a deep copy of model and optimizer trains on alike, and by itself."""
    run.steps(0, 3)
    before = run.weights
    twin = Training(*copy.deepcopy((run.model, run.optimizer)))
    seen = twin.steps(3, 3)
    if not same(run.weights, before):
        rule, fix = (
            "a deep copy must have weights of its own",
            "hold parameters in param_groups and self.state",
        )
        run.fail(rule, expected="the original as before", seen=differences(run.weights, before), fix=fix)
    expected = run.steps(3, 3)
    if not same(seen, expected):
        rule = "a deep copy must train on as the original does"
        fix = "torch copies defaults, state and param_groups only: add the rest in __getstate__"
        run.fail(rule, expected="the same weights", seen=differences(seen, expected), fix=fix)


def leaves_gradients_alone(make: Make, run: Training) -> None:
    """gradients are not modified."""
    for step in range(3):
        run.give_gradients(step)
        given = [parameter.grad for parameter in run.model.parameters()]
        before = [gradient.clone() for gradient in given if gradient is not None]
        run.optimizer.step()
        after = [parameter.grad for parameter in run.model.parameters()]
        if [id(one) for one in after] != [id(one) for one in given] or not same(before, given):  # type: ignore[arg-type]
            rule, fix = "step must not modify gradients", "g = p.grad.mul(...), never p.grad.mul_(...)"
            run.fail(rule, expected="gradients as they were given", seen="others", fix=fix)


def leaves_global_random_numbers_alone(make: Make, run: Training) -> None:
    """no global random state is touched."""
    run.give_gradients(0)
    groups, rule = groups_of(small_model(torch.float32, 12)), "must not touch global random states"
    with no_random_trace(run.name, f"making it {rule}", "take a torch.Generator"):
        make(groups)
    fix = "altgrad_core.random_bits.uniform((seed, step, tensor), shape) draws without a state"
    with no_random_trace(run.name, f"step {rule}", fix):
        run.optimizer.step()


def does_not_depend_on_threads(make: Make, run: Training) -> None:
    """one thread and two give the same bits."""
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            seen.append(Training.of(make, width=_PARALLEL).steps(0, 3))
    finally:
        torch.set_num_threads(threads)
    if not same(*seen):
        rule, fix = "threads must not change bits", "key random numbers by element; reduce in a fixed order"
        run.fail(rule, expected="the same weights", seen=differences(*seen), fix=fix, given="1 and 2 threads")
