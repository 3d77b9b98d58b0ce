"""ManifoldAdamW's weights that the loops in C step: what goes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from altgrad_core import native
from altgrad_core.stiffness import grid_stiffness
from altgrad_optim import native_steps
from altgrad_optim.base import Gridded
from altgrad_optim.powers import pointwise

if TYPE_CHECKING:
    from altgrad_optim.manifold import ManifoldAdamW


class Pass(NamedTuple):
    """What the loops need of a group's weights, and what they leave."""

    table: native_steps.ManifoldTable
    without_loop: list[tuple[int, int]]
    """Rows of the table whose stiffness there is no loop for, and the places of their weights."""
    left: list[int]
    """Places of the weights that the loops cannot take."""
    uncounted: list[int]
    """Places of the weights with a position that the loops do not count."""
    owners: list[object]


_kept: native.KeptTables[Pass] = native.KeptTables()


def found(
    optimizer: ManifoldAdamW,
    group: dict[str, Any],
    gridded: Sequence[Gridded],
    positions: Sequence[Tensor | None],
) -> Pass:
    """Find the weights that there are loops for.

    positions: of each weight, for the loops to count on; None where nobody wants it.
    """
    on_cpu = any(weight.is_cpu for weight, *_ in gridded)
    powers = {group["p"], group["q"]}
    if not on_cpu or not native_steps.available() or not powers <= native_steps.POWERS.keys():
        tracked = [place for place, one in enumerate(positions) if one is not None]
        return Pass(native_steps.ManifoldTable([]), [], list(range(len(gridded))), tracked, [])
    weights = [weight for weight, *_ in gridded]
    states = [optimizer.state[weight] for weight in weights]
    names = "exp_avg", "exp_avg_sq", "step"
    made_of = (
        native.whereabouts(weights),
        native.whereabouts([weight.grad for weight in weights]),
        [state[name].data_ptr() for state in states for name in names],
        [(scale.data_ptr(), scale.dim(), scale.dtype) for *_, scale in gridded],
        [format for _, format, _ in gridded],
        (optimizer.formula_of(group), bool(group["p"] or group["q"])),
        [0 if one is None else one.data_ptr() for one in positions],
    )
    return _kept.get(optimizer, group, made_of, lambda: _made(optimizer, group, gridded, positions))


def step(
    optimizer: ManifoldAdamW, group: dict[str, Any], gridded: Sequence[Gridded], these: Pass
) -> list[Gridded]:
    """Take the step of these weights, and return the others."""
    spread = {
        row: optimizer.stiffness_at(group, gridded[place]).float().contiguous()
        for row, place in these.without_loop
    }
    for row, stiffness in spread.items():
        these.table.take_stiffness(row, stiffness.data_ptr())
    if these.table.sizes:
        native_steps.manifold_steps(
            these.table,
            lr=optimizer.grid_lr(group),
            decay=optimizer.left_by_decay(group),
            betas=group["betas"],
            eps=group["eps"],
            powers=(group["p"], group["q"]),
            normalize=group["normalize"],
            max_stiffness=group["max_stiffness"],
        )
    return [gridded[place] for place in these.left]


def _made(
    optimizer: ManifoldAdamW,
    group: dict[str, Any],
    gridded: Sequence[Gridded],
    positions: Sequence[Tensor | None],
) -> Pass:
    blocks, moves, without_loop, left, uncounted, owners = native.Blocks(), [], [], [], [], []
    for place, (one, position) in enumerate(zip(gridded, positions, strict=True)):
        (weight, format, scale), state = one, optimizer.state[one[0]]
        memory = weight, weight.grad, state["exp_avg"], state["exp_avg_sq"]
        loops = blocks.of(format) if native.readable(*memory) else None
        countable = loops is not None and native.one_number(scale)
        counts = position if countable and position is not None and native.readable(position) else None
        if position is not None and counts is None:
            uncounted.append(place)
        if loops is None:
            left.append(place)
            continue
        loop = _loop_of(optimizer, group, one, loops)
        if loop is None:
            without_loop.append((len(moves), place))
        where = [tensor.data_ptr() for tensor in (*memory, state["step"])]
        moves.append(_move(where, scale, loop or loops, counts, loops, weight.numel()))
        owners += [loop, loops]
    return Pass(native_steps.ManifoldTable(moves), without_loop, left, uncounted, owners)


def _move(
    where: Sequence[int],
    scale: Tensor,
    loop: native.BlockLoops | native.SpacingLoop,
    position: Tensor | None,
    loops: native.BlockLoops,
    elements: int,
) -> native_steps.ManifoldMove:
    """Return a weight's step for the loops.

    where: the first five addresses. loop: of the stiffness. loops: of the format, for the position.
    """
    function = loop.spacings if isinstance(loop, native.BlockLoops) else loop.function
    counts = 0 if position is None else position.data_ptr()
    ulps = loops.spacings, loops.context
    return native_steps.ManifoldMove(
        *where, 0, function, loop.context, scale.data_ptr(), counts, *ulps, elements
    )


def _loop_of(
    optimizer: ManifoldAdamW, group: dict[str, Any], one: Gridded, loops: native.BlockLoops
) -> native.BlockLoops | native.SpacingLoop | None:
    """Return the loop in C that knows the stiffness of a weight, None where there is none.

    The spacing of its own grid is among its format's `loops`, which serve also where there is no stiffness; a
    formula may offer another.
    """
    _, format, scale = one
    if not (group["p"] or group["q"]):
        return loops
    formula = pointwise(optimizer.formula_of(group)) if native.one_number(scale) else None
    if formula is grid_stiffness:
        return loops
    offered = getattr(formula, "block_loop", None)
    return offered(format) if offered is not None else None
