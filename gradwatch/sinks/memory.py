"""Keeps the records of the last steps in memory, for notebooks and tests."""

from __future__ import annotations

from collections import deque

from gradwatch.records import Alert, Intervention, Snapshot


class MemorySink:
    """Holds the newest `limit` Snapshots, and all alerts and interventions."""

    def __init__(self, limit: int = 10_000) -> None:
        self.snapshots: deque[Snapshot] = deque(maxlen=limit)
        self.interventions: list[Intervention] = []
        self._alerts: dict[tuple[str, str, int], Alert] = {}

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """The newest record of each alert, in order of opening."""
        return tuple(self._alerts.values())

    def write(self, snapshot: Snapshot, alerts: tuple[Alert, ...], interventions: tuple[Intervention, ...]) -> None:
        """Keep one step."""
        self.snapshots.append(snapshot)
        self._alerts |= {alert.key: alert for alert in alerts}
        self.interventions.extend(interventions)

    def flush(self) -> None:
        """Memory needs none."""

    def close(self) -> None:
        """Keep what was written."""
