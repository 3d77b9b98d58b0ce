"""The arms of a comparison: the axis of [grid] that holds them, and what is wrong with it. No torch.

An arm that is a table may carry `step_of = k`, which is no option of its plugin: it takes the step size that
arm k was tuned to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from altgrad_core.compare import CompareOptions
from altgrad_core.options import Path
from altgrad_core.overrides import Override, spelled, split
from altgrad_core.partial import UNKNOWN, known
from altgrad_core.structuring import Problem
from altgrad_core.wording import listed, suggestion

HERE: Path = ("compare",)
STEP_OF = "step_of"


@attrs.frozen
class Arm:
    """One value of the axis that is compared: a table of options, as `[grid]` lists it."""

    given: Override
    """As the file has it."""
    own: Override
    """Without `step_of`."""
    step_of: int | None = None


def arm_axis(options: CompareOptions, axes: Sequence[Sequence[Override]]) -> tuple[int | None, list[Problem]]:
    """Return which of the axes holds the arms, None: none does; and what is wrong."""
    problems = [
        Problem(axis[0].origin.path[:-1], "[compare] gives the seeds: set compare.seeds, remove the axis")
        for axis in axes
        if axis[0].path == ("seed",)
    ]
    if options.arm is UNKNOWN:
        return None, problems
    names = [spelled(axis[0].path) for axis in axes]
    try:
        arm = spelled(split(options.arm))
    except ValueError:
        arm = options.arm
    if arm not in names:
        hint = suggestion(arm, names) or f"; its axes are: {listed(names)}"
        problems.append(Problem((*HERE, "arm"), f"{options.arm!r} is no axis of [grid]{hint}"))
        return None, problems
    position = names.index(arm)
    return position, [*problems, *known(_count_problems(options, len(axes[position])))]


def _count_problems(options: CompareOptions, count: int) -> Iterator[Problem]:
    if count < 2:
        yield Problem((*HERE, "arm"), f"{options.arm!r} has one value, nothing to compare; add one")
    elif options.baseline >= count:
        message = f"there are {count} arms, counted from 0; got {options.baseline}"
        yield Problem((*HERE, "baseline"), message)


def arm_of(value: Override) -> Arm:
    """Return an arm from a value of its axis."""
    if not isinstance(value.value, dict) or STEP_OF not in value.value:
        return Arm(value, value)
    table = {key: inner for key, inner in value.value.items() if key != STEP_OF}
    return Arm(value, attrs.evolve(value, value=table), value.value[STEP_OF])


def arm_problems(options: CompareOptions, arms: Sequence[Arm]) -> Iterator[Problem]:
    """Yield what is wrong with the arms' `step_of`."""
    for index, arm in enumerate(arms):
        if arm.step_of is not None and (wrong := _wrong_step_of(arm.step_of, index, options, arms)):
            yield Problem((*arm.given.origin.path, STEP_OF), wrong)


def _wrong_step_of(of: object, index: int, options: CompareOptions, arms: Sequence[Arm]) -> str:
    if type(of) is not int or not 0 <= of < len(arms):
        return f"expected the index of an arm, 0 to {len(arms) - 1}, got {of!r}"
    if of == index:
        return "is the arm itself; name another, or leave it out"
    if arms[of].step_of is not None:
        return f"arm {of} takes its own step size from arm {arms[of].step_of}; name a tuned one"
    if index == options.baseline:
        return "the baseline is tuned by itself; leave it out, or choose another baseline"
    return ""
