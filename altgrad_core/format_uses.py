"""What the formats in use make of the options around them: what bfloat16 cannot hold, what has no effect.

Decided from names and numbers alone, without torch. What only a third party's table of values can tell is
found when the run is assembled.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from altgrad_core import rules
from altgrad_core.options import FieldError, FormatChoice, Path, default_of, written
from altgrad_core.quantize_options import ScaleOptions
from altgrad_core.wording import listed

if TYPE_CHECKING:
    from altgrad_core.quantize_options import QuantizeOptions

NEVER_SCALED = ("BF16", "E8M7", "FP16", "E5M10")
"""Formats, by both of their names, that cover the range of real tensors by themselves: their scale is 1."""

BFLOAT16_DIGITS, BFLOAT16_BOTTOM = 8, -133
"""Significant bits of bfloat16, and the exponent of its smallest subnormal."""

_SHAPE = re.compile(r"E(\d+)M(\d+)(?!\d)")
_OTHER_NAMES = {"FP16": (5, 10), "BF16": (8, 7)}


def inexact_in_bfloat16(
    quantize: QuantizeOptions, layers: Collection[str], tied: Collection[str]
) -> Iterator[FieldError]:
    """Yield what loses bits under bfloat16 autocast, where grid values times powers of two do not."""
    way_out = 'set train.dtype = "float32"'
    for table, at, choice in _uses(quantize, layers, tied):
        options = _tables(quantize)[table]
        if not held_by_bfloat16(choice):
            yield FieldError(
                at,
                f"{_shown(choice)} does not survive bfloat16 autocast, which holds {BFLOAT16_DIGITS} "
                f"significant bits; {way_out}, or name another format",
            )
        option = _inexact_option(options)
        if option and is_scaled(options, choice):
            cause = 'scale_rule = "exact"' if option == "scale_rule" else option
            yield FieldError(
                (option,) if table == "format" else (table, option),
                f"{_shown(choice)} under {cause} has scales that are no powers of two: inexact under "
                f"bfloat16 autocast; {way_out}, or leave it out",
            )


def _inexact_option(options: ScaleOptions) -> str:
    """Return the option that makes scales other than powers of two, if there is one."""
    if options.granularity == "block" and not options.block_scale.unquantized:
        return "block_scale"
    return "scale_rule" if options.scale_rule == "exact" else ""


def held_by_bfloat16(choice: FormatChoice) -> bool:
    """Whether bfloat16 holds every value of the format; True where names and numbers do not tell."""
    shape = _shape(choice)
    if shape is None:
        return True
    exponent_bits, mantissa_bits = shape
    leading = 1 if exponent_bits else 0  # the bit that is not stored
    bias = getattr(choice.options, "bias", None)
    bottom = BFLOAT16_BOTTOM if bias is None else leading - bias - mantissa_bits
    return leading + mantissa_bits <= BFLOAT16_DIGITS and bottom >= BFLOAT16_BOTTOM


def _shape(choice: FormatChoice) -> tuple[int, int] | None:
    """Return the numbers of exponent and mantissa bits, by the format's options or its name."""
    numbers = [getattr(choice.options, name, None) for name in ("exponent_bits", "mantissa_bits")]
    if isinstance(numbers[0], int) and isinstance(numbers[1], int):
        return numbers[0], numbers[1]
    if found := _SHAPE.match(choice.bare_name):
        return int(found[1]), int(found[2])
    return _OTHER_NAMES.get(choice.bare_name)


def _uses(
    quantize: QuantizeOptions, layers: Collection[str], tied: Collection[str]
) -> Iterator[tuple[str, Path, FormatChoice]]:
    """Yield each format that some layer uses, once: its table, where it is written, and the format."""
    indices = {layer: rules.first_match(quantize.rule, layer) for layer in layers}
    for index in dict.fromkeys(indices[one] for one in layers if indices[one] is not None or one not in tied):
        for table, options in _tables(quantize).items():
            own = None if index is None else getattr(quantize.rule[index], table)
            choice = own or options.format
            if not choice.unquantized:
                below: Path = ("format",) if table == "format" else (table, "format")
                yield table, ("rule", index, table) if own and index is not None else below, choice


def _tables(quantize: QuantizeOptions) -> Mapping[str, Any]:
    """Return the options of weights, activations and gradients, by what a rule calls their format."""
    return {"format": quantize, "activations": quantize.activations, "gradients": quantize.gradients}


def is_scaled(options: ScaleOptions, choice: FormatChoice) -> bool:
    """Whether tensors in this format have a scale other than 1; False for a format that is none."""
    if choice.unquantized:
        return False
    return options.granularity != "none" and choice.bare_name not in NEVER_SCALED


def _shown(choice: FormatChoice) -> str:
    return written(choice) if choice.plain_options() else choice.bare_name


def without_effect(quantize: QuantizeOptions, plan: Collection[rules.LayerPlan]) -> Iterator[tuple[str, str]]:
    """Yield the options that are set and change nothing, as `[quantize]` spells them, and why.

    They are no mistakes: a grid of runs may vary what makes them matter.
    """
    for table, options in _tables(quantize).items():
        used = [layer for layer in plan if not getattr(layer, table).unquantized]
        prefix = "" if table == "format" else f"{table}."
        idle = dict(_idle_scales(options, [getattr(layer, table) for layer in used])) if used else {}
        if table == "format" and used:
            idle |= _idle_roundings({layer.storage for layer in used})
        for name, reason in idle.items():
            field = attrs.fields_dict(type(options)).get(name)
            if field is not None and getattr(options, name) != default_of(field, options):
                yield f"{prefix}{name} = {written(getattr(options, name))}", reason


def _idle_roundings(storages: Collection[str]) -> Mapping[str, str]:
    idle: dict[str, str] = {}
    if "master" not in storages:
        reason = "weights on the grid are used as they are; storage_rounding rounds them"
        idle |= {"rounding": reason, "overflow": reason}
    if "grid" not in storages:
        idle["storage_rounding"] = "no weight is stored on the grid"
    return idle


def _idle_scales(options: Any, choices: Collection[FormatChoice]) -> Iterator[tuple[str, str]]:
    if options.granularity != "block":
        yield "block", 'granularity is not "block"'
    if options.scale_mode != "delayed":
        yield "amax_history", f'scale_mode is "{options.scale_mode}"'
    if not any(is_scaled(options, choice) for choice in choices):
        names = listed(dict.fromkeys(map(_shown, choices)))
        reason = 'granularity is "none"' if options.granularity == "none" else f"the scale of {names} is 1"
        for name in ("scale_rule", "block_scale", "margin", "scale_mode", "amax", "amax_history"):
            yield name, reason
