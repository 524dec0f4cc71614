"""`Turns`: clients take turns, so that none waits for all that another has asked for."""

from collections.abc import Collection


class Turns:
    """When each client had its last turn."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._count = 0

    def last(self, client: str) -> int:
        """Grows with each turn of any client; 0 before the client's first."""
        return self._last.get(client, 0)

    def take(self, client: str, present: Collection[str]) -> None:
        """Tells that a client has its turn; those that are not present are forgotten."""
        self._count += 1
        self._last = {name: count for name, count in self._last.items() if name in present}
        self._last[client] = self._count
