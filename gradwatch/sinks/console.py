"""Tells people about alerts: one readable block when one opens, gets worse, or is over."""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import TextIO

from gradwatch.records import Alert, Intervention, Snapshot

COLOURS = {"info": "36", "warning": "33", "critical": "31", "resolved": "32"}
MAX_LAYERS = 4
MAX_WIDTH = 100


class ConsoleSink:
    """Writes to `stream`, by default to what `sys.stderr` is at the time: it does not mix with a program's output."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def write(self, snapshot: Snapshot, alerts: tuple[Alert, ...], interventions: tuple[Intervention, ...]) -> None:
        """Print what changed; alerts of severity ``info`` are for the files."""
        stream = sys.stderr if self._stream is None else self._stream
        for alert in alerts:
            if alert.severity != "info" and alert.change != "updated":
                self._print(stream, alert, several=snapshot.several_lanes)
        for intervention in interventions:
            text = f"gradwatch: {intervention.kind} at step {intervention.step}: {intervention.reason}"
            stream.write(_encodable(text, stream) + "\n")

    def flush(self) -> None:
        """Hand the text to the terminal."""
        (sys.stderr if self._stream is None else self._stream).flush()

    def close(self) -> None:
        """Leave the stream open: it is not ours."""

    def _print(self, stream: TextIO, alert: Alert, *, several: bool) -> None:
        interactive = stream.isatty()
        block = "\n".join(_block(alert, several=several, width=_width(), colour=interactive and _wants_colour()))
        # A progress bar leaves the cursor in the middle of its line.
        stream.write(_encodable(("\r\033[K" if interactive else "") + block + "\n", stream))
        stream.flush()


def _block(alert: Alert, *, several: bool, width: int, colour: bool) -> Iterator[str]:
    resolved = alert.change == "resolved"
    tint = COLOURS["resolved" if resolved else alert.severity]
    title = f"{alert.kind} is over" if resolved else f"{alert.kind} ({alert.severity})"
    if alert.change == "escalated":
        title += ", worse than before"
    place = f", optimizer {alert.optimizer!r}" if several else ""
    head = f"gradwatch · {title} · step {alert.step}, since step {alert.first_step}{place}"
    bar = "┃ "
    yield f"\033[{tint};1m{bar}{head}\033[0m" if colour else f"{bar}{head}"
    for line in _body(alert, width - len(bar)):
        yield f"\033[{tint}m{bar}\033[0m{line}" if colour else f"{bar}{line}"


def _body(alert: Alert, width: int) -> Iterator[str]:
    if alert.change == "resolved":
        return
    yield from textwrap.wrap(alert.message, width)
    if alert.layers:
        named = [layer or "(root)" for layer in alert.layers[:MAX_LAYERS]]
        more = f" and {len(alert.layers) - MAX_LAYERS} more" if len(alert.layers) > MAX_LAYERS else ""
        yield from textwrap.wrap(f"layers: {', '.join(named)}{more}", width, subsequent_indent="  ")
    if math.isfinite(alert.value) and math.isfinite(alert.threshold):
        yield f"reading {alert.value:.3g}, threshold {alert.threshold:.3g}"
    for cause in alert.causes:
        yield from textwrap.wrap(f"cause: {cause.name}. {cause.evidence}", width, subsequent_indent="  ")
        yield from textwrap.wrap(f"remedy: {cause.remedy}", width, subsequent_indent="  ")


def _width() -> int:
    return min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)


def _wants_colour() -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _encodable(text: str, stream: TextIO) -> str:
    """Replace what the stream's encoding cannot say."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = text.replace("┃", "|").replace("·", "-").replace("‖", "||").replace("Δ", "d").replace("×", "x")
        return plain.encode(encoding, errors="replace").decode(encoding)
    return text
