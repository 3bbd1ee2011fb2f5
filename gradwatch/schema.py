"""The written form of the records: tags of TensorBoard, objects of JSON, both versioned."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable

from gradwatch.records import Alert, Floats, Intervention, Snapshot, Tensors

VERSION = 1

PLUGIN = "gradwatch"
ALERT_PLUGIN = "gradwatch_alerts"
ALERT_TAG = "gradwatch/alerts"
ALERT_TEXT_TAG = "gradwatch/alerts/text_summary"
INTERVENTION_TEXT_TAG = "gradwatch/interventions/text_summary"

STATISTICS: tuple[str, ...] = (
    "norm",
    "max_abs",
    "nonfinite",
    "mean",
    "std",
    "zero_fraction",
    "row_spread",
    "weight_norm",
    "update_norm",
    "update_ratio",
    "lost",
)
"""The columns of a Snapshot that are written, in this order."""

DIGITS = 7
"""Significant digits of a number in JSON: what float32 holds."""


def schema_json(tensors: Tensors) -> str:
    """Describe what the written vectors run over."""
    return json.dumps(
        {
            "v": VERSION,
            "tensors": list(tensors.names),
            "layers": list(tensors.layers),
            "modules": list(tensors.modules),
            "numel": tensors.numel.tolist(),
            "order": tensors.order_source,
            "statistics": list(STATISTICS),
        },
        separators=(",", ":"),
    )


def schema_id(text: str) -> str:
    """Return the short name of a schema: other tensors begin another family of tags."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:8]


def schema_tag(identity: str) -> str:
    """Return the tag under which a schema itself is written."""
    return f"gradwatch/schema/{identity}"


def statistic_tag(identity: str, statistic: str) -> str:
    """Return the tag of one statistic's vector."""
    return f"gradwatch/stats/{identity}/{statistic}"


def scalar_tag(snapshot: Snapshot, name: str) -> str:
    """Return the tag of one number of a step; several optimizers have a level of their own."""
    return f"gradwatch/{_level(snapshot)}{name}"


def block_tag(snapshot: Snapshot, block: str) -> str:
    """Return the tag of one block's norm: a group of its own, or it would push the others off the first page."""
    return f"gradwatch_log10_block_norm/{_level(snapshot)}{block}"


def _level(snapshot: Snapshot) -> str:
    return f"{snapshot.optimizer}/" if snapshot.several_lanes else ""


def snapshot_object(snapshot: Snapshot, identity: str) -> dict[str, object]:
    """Return one step as a JSON object; what was not measured, or is not finite, is null."""
    numbers = {name: number(getattr(snapshot, name)) for name in _NUMBERS}
    written: dict[str, object] = {
        "v": VERSION,
        "type": "step",
        "schema": identity,
        "optimizer": snapshot.optimizer,
        "step": snapshot.step,
        "log_step": snapshot.log_step,
        "source": snapshot.source,
        "skipped": snapshot.skipped,
        "detail": snapshot.detail,
        **numbers,
        "learning_rates": [number(rate) for rate in snapshot.learning_rates],
        "state": snapshot.state.tolist(),
    }
    return written | {name: vector(getattr(snapshot, name)) for name in STATISTICS}


_NUMBERS = ("loss", "loss_scale", "global_norm", "clipped_norm", "clip_coefficient", "clip_rate", "rate_factor")


def alert_object(alert: Alert) -> dict[str, object]:
    """Return an alert as a JSON object."""
    return {
        "v": VERSION,
        "type": "alert",
        "kind": alert.kind,
        "symptom": alert.symptom,
        "severity": alert.severity,
        "change": alert.change,
        "optimizer": alert.optimizer,
        "step": alert.step,
        "first_step": alert.first_step,
        "opened": alert.opened,
        "resolved": alert.resolved,
        "layers": list(alert.layers),
        "tensors": list(alert.tensors),
        "value": number(alert.value),
        "threshold": number(alert.threshold),
        "message": alert.message,
        "cause": alert.cause,
        "causes": [
            {"name": c.name, "confidence": number(c.confidence), "evidence": c.evidence, "remedy": c.remedy}
            for c in alert.causes
        ],
    }


def intervention_object(intervention: Intervention) -> dict[str, object]:
    """Return an intervention as a JSON object."""
    return {
        "v": VERSION,
        "type": "intervention",
        "step": intervention.step,
        "optimizer": intervention.optimizer,
        "kind": intervention.kind,
        "reason": intervention.reason,
        "before": number(intervention.before),
        "after": number(intervention.after),
    }


def number(value: float | None) -> float | None:
    """Round for JSON, which knows neither NaN nor infinity."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def vector(values: Floats) -> list[float | None] | None:
    """Round a column for JSON; None for one that was not measured at all."""
    rounded = [number(value) for value in values.tolist()]
    return rounded if any(value is not None for value in rounded) else None


def alert_table(alerts: Iterable[Alert]) -> str:
    """Return the alerts of one step as a Markdown table."""
    lines = ["| | kind | severity | since step | layers | what | cause | remedy |", "|---" * 8 + "|"]
    for alert in alerts:
        layers = ", ".join(f"`{layer or '(root)'}`" for layer in alert.layers[:5])
        more = f" and {len(alert.layers) - 5} more" if len(alert.layers) > 5 else ""
        lines.append(
            f"| {alert.change} | **{alert.kind}** | {alert.severity} | {alert.first_step} | {layers}{more} "
            f"| {_escaped(alert.message)} | {_causes(alert)} | {_remedy(alert)} |"
        )
    return "\n".join(lines)


def intervention_table(interventions: Iterable[Intervention]) -> str:
    """Return what was changed at one step as a Markdown table."""
    lines = ["| change | before | after | why |", "|---|---|---|---|"]
    lines += [
        f"| **{made.kind}** | {made.before:.4g} | {made.after:.4g} | {_escaped(made.reason)} |"
        for made in interventions
    ]
    return "\n".join(lines)


def _remedy(alert: Alert) -> str:
    return _escaped(alert.causes[0].remedy) if alert.causes else ""


def _causes(alert: Alert) -> str:
    """Name the first cause with its evidence, and the others."""
    if not alert.causes:
        return ""
    others = ", ".join(cause.name for cause in alert.causes[1:])
    first = f"**{alert.causes[0].name}**: {_escaped(alert.causes[0].evidence)}"
    return f"{first} Otherwise: {others}." if others else first


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
