"""The host side of one optimizer: what a step means in the light of the steps before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gradwatch.diagnosis import diagnose
from gradwatch.episodes import Episodes
from gradwatch.errors import Part, contain
from gradwatch.history import Detector, History
from gradwatch.records import Alert, Cause, Evidence, Snapshot


@dataclass(eq=False)
class Judge:
    """The past, the detectors and the open alerts of one optimizer. A detector that fails is switched off alone."""

    name: str
    detectors: tuple[Detector, ...]
    episodes: Episodes
    history: History = field(default_factory=History)
    _parts: tuple[Part, ...] = field(init=False)
    _part: Part = field(init=False)
    _naming: Part = field(init=False)

    def __post_init__(self) -> None:
        self._parts = tuple(Part(f"the detector {_name_of(detector)}") for detector in self.detectors)
        self._part = Part("judging")
        self._naming = Part("naming causes")
        self.episodes.diagnose = self._causes

    def judge(self, snapshot: Snapshot) -> tuple[Alert, ...]:
        """Return the alerts that this step changed."""
        changed: tuple[Alert, ...] = ()
        if not self._part.failed:
            with contain(self._part):
                self.history.update(snapshot)
                changed = self.episodes.judge(snapshot, list(self._evidence(snapshot)))
        return changed

    def wants_detail(self) -> bool:
        """Whether evidence is open."""
        return self.episodes.wants_detail and not self._part.failed

    def wants_probe(self) -> bool:
        """Whether evidence gathers whose cause the forward pass may tell."""
        return not self._part.failed and (self.episodes.wants_probe or self.history.just_stuck)

    def state(self) -> dict[str, object]:
        """Return what must survive a restart."""
        memories = {_name_of(detector): _memory(detector) for detector in self.detectors}
        return {
            "history": self.history.state(),
            "episodes": self.episodes.state(),
            "detectors": {name: memory for name, memory in memories.items() if memory},
        }

    def restore(self, state: Any) -> None:  # noqa: ANN401 - from a checkpoint
        """Go on from what `state` returned."""
        self.history.restore(state["history"])
        self.episodes.restore(state["episodes"])
        for detector in self.detectors:
            memory = state["detectors"].get(_name_of(detector))
            if memory is not None and hasattr(detector, "restore"):
                detector.restore(memory)

    def _causes(self, alert: Alert, snapshot: Snapshot) -> tuple[Cause, ...]:
        causes: tuple[Cause, ...] = ()
        if not self._naming.failed:
            with contain(self._naming):
                causes = diagnose(alert, snapshot, self.history)
        return causes

    def _evidence(self, snapshot: Snapshot) -> Iterator[Evidence]:
        for detector, part in zip(self.detectors, self._parts, strict=True):
            if not part.failed:
                with contain(part):
                    yield from list(detector(snapshot, self.history))


def _name_of(detector: object) -> str:
    return str(getattr(detector, "__name__", type(detector).__name__))


def _memory(detector: object) -> object:
    return detector.state() if hasattr(detector, "state") else None
