"""One decision for all ranks: what reactions may not see differently is taken from rank 0."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

from torch import distributed

from gradwatch.records import Alert

TIMEOUT = timedelta(seconds=120)
"""How long a rank waits for one that has ended early, before its reactions are switched off."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """Hands rank 0's loss and alerts to every rank, over a group of its own on the host.

    Losses, batches and forward passes differ from rank to rank, and a learning rate that differs would tear the
    replicas apart. Gradient norms are the same everywhere. One small message a judged step, with reactions only.
    """

    group: Any

    def share(self, loss: float | None, alerts: tuple[Alert, ...]) -> tuple[float | None, tuple[Alert, ...]]:
        """Return what rank 0 knows."""
        carried: list[object] = [loss, alerts]
        distributed.broadcast_object_list(carried, src=0, group=self.group)
        return cast("float | None", carried[0]), cast("tuple[Alert, ...]", carried[1])


def agree() -> Agreement | None:
    """Make the group, on every rank at the same place; None in a run of one process."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    return Agreement(distributed.new_group(backend="gloo", timeout=TIMEOUT))
