"""The files of `otel/registry/`, in the format of OpenTelemetry's Weaver: its definition format 2."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from grafana.registry.attributes import (
    ATTRIBUTES,
    METRICS,
    OWN,
    Attribute,
    allowed_at,
    at_place,
)
from grafana.registry.signals import EVENTS, GROUPS, REQUEST, SPANS, Event, Place, Span
from service.telemetry import names
from service.telemetry.names import Metric

FOLDER: Final = Path(__file__).resolve().parents[2] / "otel/registry"
CONVENTIONS: Final = "1.41.0"
"""The version that the registry depends on: one that has the GenAI conventions, which have moved since."""

INSTRUMENTS: Final = {"up_down_counter": "updowncounter"}
HEAD: Final = "# Made by `make dashboards` from grafana/registry/ and service/telemetry/names.py.\n"
MANIFEST: Final = {
    "description": "Every span, event, metric and attribute of llmops-api.",
    "schema_url": "https://llmops-api.example/schemas/llmops-api/1.0.0",
    "stability": "development",
    "dependencies": [
        {
            "schema_url": f"https://opentelemetry.io/schemas/{CONVENTIONS}",
            "registry_path": "https://github.com/open-telemetry/semantic-conventions/archive/refs/tags/"
            f"v{CONVENTIONS}.zip[model]",
        }
    ],
}


def generated() -> dict[str, str]:
    """Return the file name and the content of each file."""
    ours = {metric.name for metric in names.METRICS}
    imported = [metric.name for metric in METRICS if metric.name not in ours]
    return {
        "manifest.yaml": _text(MANIFEST),
        "attributes.yaml": _file(attributes=[_attribute(attribute) for attribute in OWN]),
        "metrics.yaml": _file(metrics=[_metric(metric) for metric in names.METRICS]),
        "spans.yaml": _file(spans=[_span(span) for span in SPANS]),
        "events.yaml": _file(events=[_event(event) for event in EVENTS]),
        "groups.yaml": _file(
            attribute_groups=[
                {
                    "id": group.id,
                    "visibility": "public",
                    "brief": f"{group.brief}.",
                    "stability": "development",
                    "attributes": _references(group),
                }
                for group in GROUPS
            ],
            imports={"metrics": imported},
        ),
    }


def _file(**sections: object) -> str:
    return _text({"file_format": "definition/2", **sections})


def _text(content: Mapping[str, object]) -> str:
    return HEAD + yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=110)


def _attribute(attribute: Attribute) -> dict[str, Any]:
    entry: dict[str, Any] = {"key": attribute.key, "type": attribute.type}
    if attribute.values:
        entry["type"] = {
            "members": [
                {"id": member_id(value), "value": value, "stability": "development"}
                for value in attribute.values
            ]
        }
    entry |= {"brief": f"{attribute.brief}.", "stability": "development"}
    if attribute.examples:
        entry["examples"] = list(attribute.examples)
    return entry


def member_id(value: str) -> str:
    """The id of an enum's member: its value in snake case."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", value).lower().replace("-", "_")


def _metric(metric: Metric) -> dict[str, Any]:
    return {
        "name": metric.name,
        "instrument": INSTRUMENTS.get(metric.kind, metric.kind),
        "unit": metric.unit,
        "brief": f"{metric.description}.",
        "stability": "development",
        "attributes": [_of_metric(key, values) for key, values in metric.attributes.items()],
    }


def _of_metric(key: str, values: tuple[str, ...] | str) -> dict[str, Any]:
    condition = "If the call failed." if key == "error.type" else ""
    if key == "model" and isinstance(values, str) and values == names.BREAKER_MODEL:
        condition = f"If breaker is {names.MODEL_BREAKER}."
    return _reference(key, {"conditionally_required": condition} if condition else "required", values)


def _reference(key: str, level: object, values: tuple[str, ...] | str = ()) -> dict[str, Any]:
    entry: dict[str, Any] = {"ref": key, "requirement_level": level}
    if isinstance(values, str):
        entry["note"] = f"Values: {values}."
    elif values and values != ATTRIBUTES[key].values:
        entry["annotations"] = {"values": list(values)}
    return entry


def _references(place: Place) -> list[dict[str, Any]]:
    return [_reference(one.key, level, allowed_at(one, place)) for one, level in at_place(place)]


def _span(span: Span) -> dict[str, Any]:
    return {
        "type": span.id,
        "kind": span.kind,
        "name": {"note": " or ".join(f"`{name}`" for name in span.names)},
        "brief": f"{span.brief}.",
        "stability": "development",
        "attributes": _references(span),
    }


def _event(event: Event) -> dict[str, Any]:
    references: Iterable[dict[str, Any]] = _references(event)
    own = {reference["ref"] for reference in references}
    belongs = {"conditionally_required": "If it belongs to a request."}
    of_request = [
        _reference(one.key, belongs if level == "required" else level)
        for one, level in at_place(REQUEST)
        if one.key not in own
    ]
    return {
        "name": event.name,
        "brief": f"{event.brief}.",
        "note": f"Severity: {', '.join(event.levels)}.",
        "stability": "development",
        "attributes": [*references, *of_request],
    }
