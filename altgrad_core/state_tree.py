"""Trees of state as a checkpoint holds them: JSON, with the tensors beside it by their paths. No pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a tree of state as JSON, and its tensors by path. Raises TypeError for what neither can hold."""
    tensors: dict[str, Tensor] = {}
    return _packed(state, "", tensors), tensors


def _packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        _refuse_keys(value, path)
        return {"table": [[key, _packed(inner, f"{path}/{key}", tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        items = [_packed(inner, f"{path}/{index}", tensors) for index, inner in enumerate(value)]
        return {type(value).__name__: items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{path}: state must be tensors, numbers, text, lists and tables, not {type(value).__name__}"
    )


def _refuse_keys(table: Mapping[Any, Any], path: str) -> None:
    for key in table:
        if not isinstance(key, bool | int | float | str):
            raise TypeError(f"{path}: keys of state must be numbers or text, not {key!r}")


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state that `pack` made a tree and tensors of."""
    if not isinstance(tree, dict):
        return tree
    ((kind, inner),) = tree.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "table":
        return {key: unpack(item, tensors) for key, item in inner}
    items = [unpack(item, tensors) for item in inner]
    return tuple(items) if kind == "tuple" else items
