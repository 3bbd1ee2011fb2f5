"""Calls the reactions of one optimizer after each judged step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradwatch.errors import Part, contain
from gradwatch.reactions import Reaction, Run, SkipBudget
from gradwatch.records import Alert, Intervention, Snapshot


@dataclass(eq=False)
class Reactions:
    """A reaction that fails is switched off alone; one that stops training does so."""

    reactions: tuple[Reaction, ...]
    run: Run
    _parts: tuple[Part, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._parts = tuple(Part(f"the reaction {type(reaction).__name__}") for reaction in self.reactions)

    def react(self, snapshot: Snapshot, alerts: tuple[Alert, ...]) -> Iterator[Intervention]:
        """Yield what was changed."""
        news = tuple(alert for alert in alerts if alert.change in ("opened", "escalated"))
        for reaction, part in zip(self.reactions, self._parts, strict=True):
            if not part.failed:
                with contain(part):
                    yield from reaction(snapshot, news, self.run) or ()

    def state(self) -> list[object]:
        """Return what each of them remembers."""
        return [reaction.state() if hasattr(reaction, "state") else None for reaction in self.reactions]

    def restore(self, states: Sequence[Any]) -> None:
        """Go on from what `state` returned."""
        for reaction, state in zip(self.reactions, states, strict=False):
            if state and hasattr(reaction, "restore"):
                reaction.restore(state)


def budgets_of(transforms: Iterable[object]) -> tuple[SkipBudget, ...]:
    """Return the limits that come with transforms that skip."""
    return tuple(
        SkipBudget(transform.max_consecutive, transform.max_in_window)
        for transform in transforms
        if hasattr(transform, "max_consecutive") and hasattr(transform, "max_in_window")
    )
