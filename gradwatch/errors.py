"""The two errors that reach the user, and the one place that keeps every other one away from training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

logger = logging.getLogger("gradwatch")


class ConfigurationError(ValueError):
    """Something that was passed to gradwatch cannot work; says what, and what to write instead."""


class TrainingStopped(RuntimeError):  # noqa: N818 - an event the user asked for, not a fault
    """Training ends because the user asked gradwatch to end it."""


@dataclass(slots=True)
class Part:
    """One part of gradwatch that can fail by itself; `failed` switches it off."""

    name: str
    failed: bool = False


@contextmanager
def contain(part: Part) -> Iterator[None]:
    """Report the first failure inside the block, switch `part` off, and let training go on.

    The report goes to the logger ``gradwatch`` and not to `warnings`, which a run under ``-W error`` would turn
    back into an exception.
    """
    try:
        yield
    except (ConfigurationError, TrainingStopped):
        raise
    except Exception as error:
        part.failed = True
        logger.warning(
            "%s failed and is switched off; training goes on. %s: %s",
            part.name,
            type(error).__name__,
            error,
            exc_info=error,
        )
