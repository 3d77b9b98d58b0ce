"""ManifoldAdamW's weights that the loops in C step: what goes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from altgrad_core import native
from altgrad_core.format import Format
from altgrad_core.hookspecs import Stiffness
from altgrad_core.stiffness import grid_stiffness
from altgrad_optim import native_steps
from altgrad_optim.base import Gridded
from altgrad_optim.powers import pointwise

if TYPE_CHECKING:
    from altgrad_optim.manifold import ManifoldAdamW


class _Kept(NamedTuple):
    """What the loops need of a group's weights."""

    table: native_steps.ManifoldTable
    without_loop: list[tuple[int, int]]
    """Rows of the table whose stiffness there is no loop for, and the places of their weights."""
    left: list[int]
    """Places of the weights that the loops cannot take."""
    owners: list[object]


_kept: native.KeptTables[_Kept] = native.KeptTables()


def step(optimizer: ManifoldAdamW, group: dict[str, Any], gridded: Sequence[Gridded]) -> list[Gridded]:
    """Take the step of the weights that there are loops for, and return the others."""
    if not native_steps.available() or not {group["p"], group["q"]} <= native_steps.POWERS.keys():
        return list(gridded)
    kept = _table_of(optimizer, group, gridded)
    spread = {
        row: optimizer.stiffness_at(group, gridded[place]).float().contiguous()
        for row, place in kept.without_loop
    }
    for row, stiffness in spread.items():
        kept.table.take_stiffness(row, stiffness.data_ptr())
    if kept.table.sizes:
        native_steps.manifold_steps(
            kept.table,
            lr=optimizer.grid_lr(group),
            decay=optimizer.left_by_decay(group),
            betas=group["betas"],
            eps=group["eps"],
            powers=(group["p"], group["q"]),
            normalize=group["normalize"],
            max_stiffness=group["max_stiffness"],
        )
    return [gridded[place] for place in kept.left]


def _table_of(optimizer: ManifoldAdamW, group: dict[str, Any], gridded: Sequence[Gridded]) -> _Kept:
    """Return the table of the weights' moves, made anew only when something in it has changed or moved."""
    weights = [weight for weight, *_ in gridded]
    states = [optimizer.state[weight] for weight in weights]
    names = "exp_avg", "exp_avg_sq", "step"
    made_of = (
        native.whereabouts(weights),
        native.whereabouts([weight.grad for weight in weights]),
        [state[name].data_ptr() for state in states for name in names],
        native.whereabouts([scale for *_, scale in gridded]),
        [format for _, format, _ in gridded],
        (optimizer.formula_of(group), bool(group["p"] or group["q"])),
    )
    return _kept.get(optimizer, group, made_of, lambda: _made(optimizer, group, gridded))


def _made(optimizer: ManifoldAdamW, group: dict[str, Any], gridded: Sequence[Gridded]) -> _Kept:
    blocks, moves, without_loop, left, owners = native.Blocks(), [], [], [], []
    for place, (weight, format, scale) in enumerate(gridded):
        state = optimizer.state[weight]
        memory = weight, weight.grad, state["exp_avg"], state["exp_avg_sq"]
        loops = blocks.of(format) if native.readable(*memory) else None
        if loops is None:
            left.append(place)
            continue
        loop: native.BlockLoops | native.SpacingLoop | None = loops
        if group["p"] or group["q"]:
            loop = _loop_of(optimizer.formula_of(group), format, loops) if native.one_number(scale) else None
        if loop is None:
            without_loop.append((len(moves), place))
            loop = loops
        function = loop.spacings if isinstance(loop, native.BlockLoops) else loop.function
        addresses = [one.data_ptr() for one in (*memory, state["step"])]
        grid = function, loop.context, scale.data_ptr()
        moves.append(native_steps.ManifoldMove(*addresses, 0, *grid, weight.numel()))
        owners.append(loop)
    return _Kept(native_steps.ManifoldTable(moves), without_loop, left, owners)


def _loop_of(
    stiffness: Stiffness, format: Format, loops: native.BlockLoops
) -> native.BlockLoops | native.SpacingLoop | None:
    """Return the loop in C that knows the stiffness of weights of a format, None where there is none.

    The spacing of their own grid is among the format's; a formula may offer another.
    """
    formula = pointwise(stiffness)
    if formula is grid_stiffness:
        return loops
    offered = getattr(formula, "block_loop", None)
    return offered(format) if offered is not None else None
