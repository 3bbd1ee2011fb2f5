"""Event files: one of our own, or the writer that the user has already."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer import event_file_writer, record_writer

from gradwatch.errors import ConfigurationError, logger

SUFFIX = ".gradwatch"
"""The end of the names of our event files."""

QUEUE = 100
"""Events that may wait for the disk before training does."""


class EventFile(Protocol):
    """Takes events; raises what its disk or its owner did to it."""

    def add(self, event: Event) -> None:
        """Append one event."""

    def flush(self) -> None:
        """Make what was added durable."""

    def close(self) -> None:
        """Let go of it."""


class OwnFile:
    """A file in a folder: a new one a run, which TensorBoard reads as one with the older ones beside it."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        path = _free_folder(Path(folder))
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._writer = event_file_writer.EventFileWriter(str(path), QUEUE, 120, SUFFIX)
        except OSError as error:
            raise ConfigurationError(
                f"gradwatch cannot write into the folder {os.fspath(folder)!r}: {error.strerror}; pass a writable one"
            ) from error
        accelerate(self._writer)

    def add(self, event: Event) -> None:
        """Queue one event for the writing thread."""
        self._writer.add_event(event)

    def flush(self) -> None:
        """Wait until the queue is on disk."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is queued and close."""
        self._writer.close()


class BorrowedFile:
    """The file of a `SummaryWriter` of torch or tensorboardX; flushed by us, closed by its owner."""

    def __init__(self, writer: Any) -> None:  # noqa: ANN401 - of two packages, neither of them typed
        self._writer = writer
        self._file: Any = writer._get_file_writer()  # noqa: SLF001 - the only way to add a whole event
        self._convert: Callable[[Event], Any] = lambda event: event
        if type(self._file).__module__.startswith("tensorboardX"):
            other = import_module("tensorboardX.proto.event_pb2").Event
            self._convert = lambda event: other.FromString(event.SerializeToString())

    def add(self, event: Event) -> None:
        """Append one event; on ranks where Lightning gives out a dummy, nothing."""
        if self._file is None:
            return
        if self._writer.file_writer is not self._file:
            raise RuntimeError("the SummaryWriter given to gradwatch was closed")
        self._file.add_event(self._convert(event), event.step, event.wall_time)

    def flush(self) -> None:
        """Flush the owner's writer."""
        if self._file is not None and self._writer.file_writer is self._file:
            self._file.flush()

    def close(self) -> None:
        """Flush only: the writer is not ours."""
        self.flush()


class FastRecordWriter(record_writer.RecordWriter):  # type: ignore[misc]  # tensorboard has no types
    """Writes records with a checksum computed in C; the stock writer needs 143 ns a byte, holding the GIL."""

    def write(self, data: bytes) -> None:
        """Append one record: length, its checksum, data, its checksum."""
        header = struct.pack("<Q", len(data))
        self._writer.write(header + _masked_checksum(header) + data + _masked_checksum(data))


def accelerate(writer: Any) -> bool:  # noqa: ANN401 - tensorboard has no types
    """Let a writer that we made use the fast record writer; False if its inside is not as we know it."""
    asynchronous = getattr(writer, "_async_writer", None)
    worker = getattr(asynchronous, "_worker", None)
    stock = getattr(asynchronous, "_writer", None)
    known = type(stock) is record_writer.RecordWriter and getattr(worker, "_record_writer", None) is stock
    if asynchronous is None or worker is None or stock is None or not known:
        return False
    fast = FastRecordWriter(stock._writer)  # noqa: SLF001 - the same open file
    asynchronous._writer = worker._record_writer = fast  # noqa: SLF001
    return True


def _masked_checksum(data: bytes) -> bytes:
    checksum = google_crc32c.value(data)
    rotated = (checksum >> 15) | (checksum << 17)
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def _free_folder(folder: Path) -> Path:
    """Return the folder, or one inside it while another writer is at work there: TensorBoard follows one file only."""
    if any(_is_in_use(path) for path in folder.glob("events.out.tfevents.*")):
        logger.warning(
            "Another writer is using %s; gradwatch writes to %s. Pass that SummaryWriter as log_dir to share its file.",
            folder,
            folder / "gradwatch",
        )
        return folder / "gradwatch"
    return folder


def _is_in_use(path: Path) -> bool:
    """Whether an event file of somebody else belongs to a process that is alive on this machine.

    Its name tells: ``events.out.tfevents.<time>.<host>.<process>.<number>``.
    """
    if path.name.endswith(SUFFIX):
        return False
    host = f".{socket.gethostname()}."
    if host not in path.name:
        return False
    process = path.name.rpartition(host)[2].split(".", 1)[0]
    return process.isdigit() and _is_alive(int(process))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
