"""The updates that an optimizer intended: as somebody recorded them, else the actual ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor


class Updates(Mapping[str, Tensor]):
    """Updates by parameter name: as recorded, else `after - before`, made when it is asked for."""

    def __init__(
        self, recorded: Mapping[str, Tensor], after: Mapping[str, Tensor], before: Mapping[str, Tensor]
    ) -> None:
        self._recorded, self._after, self._before = recorded, after, before

    def recorded(self, name: str) -> Tensor | None:
        """Return the update that somebody kept before rounding; None where it is the actual one."""
        return self._recorded.get(name)

    def __getitem__(self, name: str) -> Tensor:
        found = self._recorded.get(name)
        return self._after[name].detach() - self._before[name] if found is None else found

    def __contains__(self, name: object) -> bool:
        return name in self._before  # Mapping's own would make the difference

    def __iter__(self) -> Iterator[str]:
        return iter(self._before)

    def __len__(self) -> int:
        return len(self._before)
