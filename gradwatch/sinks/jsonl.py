"""One JSON object a line: steps, alerts and interventions, for programs."""

from __future__ import annotations

import json
import os
from pathlib import Path

from gradwatch.errors import ConfigurationError
from gradwatch.records import Alert, Intervention, Snapshot
from gradwatch.schema import alert_object, intervention_object, schema_id, schema_json, snapshot_object
from gradwatch.sinks.cadence import Cadence


class JSONLSink:
    """Appends to one file: every `log_every`-th step, every step with news of an alert, and all alerts.

    Raises:
        ConfigurationError: the file cannot be opened, or `log_every` is below 1.
    """

    def __init__(self, path: str | os.PathLike[str], *, log_every: int = 10) -> None:
        self._cadence = Cadence(log_every)
        self._schema = ("", "")
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        except OSError as error:
            raise ConfigurationError(
                f"gradwatch cannot write {os.fspath(path)!r}: {error.strerror}; pass a file in a writable folder"
            ) from error

    def write(self, snapshot: Snapshot, alerts: tuple[Alert, ...], interventions: tuple[Intervention, ...]) -> None:
        """Append the lines of one step."""
        if alerts or interventions or self._cadence.is_due(snapshot):
            self._line(snapshot_object(snapshot, self._schema_of(snapshot)))
        for alert in alerts:
            self._line(alert_object(alert))
        for intervention in interventions:
            self._line(intervention_object(intervention))
        if alerts or interventions:
            self.flush()

    def flush(self) -> None:
        """Hand the lines to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _schema_of(self, snapshot: Snapshot) -> str:
        """Write the schema once, before the first step that follows it."""
        text = schema_json(snapshot.tensors)
        if text != self._schema[0]:
            self._schema = (text, schema_id(text))
            self._line({"type": "schema", "id": self._schema[1], **json.loads(text)})
        return self._schema[1]

    def _line(self, record: dict[str, object]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
