"""The semantic-convention registry: as generated, valid by Weaver's format, and within the naming policies.

Weaver itself is in no package index; `otel/README.md` says how it is run from outside.
"""

import re
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from grafana import signals as table
from grafana.registry import attributes as declared
from grafana.registry.documents import FOLDER, generated, member_id
from grafana.registry.signals import EVENTS, GROUPS, SPANS
from service.telemetry import names
from tests.score import conventions
from tests.score.rules import UNIT, UNIT_NAMES

SCHEMA = yaml.safe_load((Path(__file__).parent / "registry.schema.yaml").read_text(encoding="utf-8"))
FILES = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.yaml")}
MANIFEST = "manifest.yaml"
HOW = "Run `make dashboards`, and commit what it writes. Declarations are in grafana/registry/ and names.py."

NAME = re.compile(r"[a-z][a-z0-9]*([._][a-z0-9]+)*")
"""As Weaver's policies want the names of attributes and metrics."""

LATER = "gen_ai."
"""A namespace of the conventions of which some attributes are in no version of the core conventions."""

CHANGED = {"state", "gen_ai.request.top_k"}
"""Names that the conventions have given up, or have with another type since."""

ON_SPANS = {"client_request_id", "dependency"}
"""Attributes of spans without a namespace, as callers and dashboards know them; all others have one."""

COLLIDES = {"error", "user"}
"""Fields of log lines that are namespaces too, and that people search for; see otel/weaver.toml."""


def _all(section: str) -> list[dict[str, Any]]:
    return [entry for content in FILES.values() for entry in content.get(section, [])]


SIGNALS = [*_all("metrics"), *_all("spans"), *_all("events"), *_all("attribute_groups")]


def _id(entry: object) -> str:
    return str(next(entry[key] for key in ("key", "name", "id") if isinstance(entry, dict) and key in entry))


def _signal_id(entry: object) -> str:
    assert isinstance(entry, dict)
    return str(entry.get("type") or entry.get("id") or entry["name"])


def _references() -> Iterator[tuple[str, str]]:
    for signal in SIGNALS:
        for reference in signal.get("attributes", []):
            yield _signal_id(signal), reference["ref"]


def test_the_registry_is_as_generated() -> None:
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert on_disk == generated(), HOW


def test_the_table_names_what_the_registry_has() -> None:
    """The three hold together: the names in the service, the registry, and the table in the README."""
    text = table.table()
    for entry in [*_all("metrics"), *_all("events")]:
        assert f"`{entry['name']}`" in text, HOW
    assert {metric.name for metric in names.METRICS} == {entry["name"] for entry in _all("metrics")}, HOW
    assert set(names.EVENTS) == {event.name for event in EVENTS} == {one["name"] for one in _all("events")}


@pytest.mark.parametrize("prefix", ["SPAN_", "EVENT_", "ATTR_"])
def test_every_name_of_the_service_is_declared(prefix: str) -> None:
    constants = {
        value for name, value in vars(names).items() if name.startswith(prefix) and isinstance(value, str)
    }
    known = {
        "SPAN_": {template for span in SPANS for template in span.names},
        "EVENT_": {event.name for event in EVENTS},
        "ATTR_": {attribute.key for attribute in declared.OWN},
    }[prefix]
    # Written into MLflow's records only, which are no telemetry of this service.
    records_only = {names.ATTR_LLM_STREAMED, names.ATTR_LLM_FIRST_CHUNK, names.ATTR_RETRY_DELAY}
    assert constants - known <= records_only, "declare it in grafana/registry/, then make dashboards"


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_valid_in_weavers_format(name: str) -> None:
    schema = {**SCHEMA["$defs"]["manifest"], "$defs": SCHEMA["$defs"]} if name == MANIFEST else SCHEMA
    problems = [
        f"{problem.instance_path}: {problem.message}"
        for problem in jsonschema_rs.validator_for(schema).iter_errors(FILES[name])
    ]
    assert not problems


@pytest.mark.parametrize(
    "broken",
    [
        {"file_format": "definition/2", "surplus": []},
        {"attributes": []},
        {"file_format": "definition/2", "attributes": [{"key": "a", "type": "text", "brief": "b"}]},
        {"file_format": "definition/2", "metrics": [{"name": "a", "instrument": "meter", "unit": "s"}]},
        {"file_format": "definition/2", "spans": [{"type": "a", "kind": "inner"}]},
    ],
)
def test_a_file_that_weaver_would_refuse_is_noticed(broken: dict[str, Any]) -> None:
    assert not jsonschema_rs.is_valid(SCHEMA, broken)


def test_every_reference_is_to_an_attribute_and_none_is_deprecated() -> None:
    own = {entry["key"] for entry in _all("attributes")}
    lost = [pair for pair in _references() if pair[1] not in own and pair[1] not in conventions.ATTRIBUTES]
    assert not lost, "neither declared here nor one of OpenTelemetry's"
    deprecated = {pair[1] for pair in _references() if pair[1] in conventions.DEPRECATED - own}
    assert deprecated == declared.RENAMED.keys()


def test_a_deprecated_attribute_stands_beside_the_one_that_replaces_it() -> None:
    for names_of_one in declared.RENAMED.items():
        old, new = (declared.ATTRIBUTES[name] for name in names_of_one)
        assert (old.required, old.recommended) == (new.required, new.recommended)


def test_a_deprecated_attribute_is_known_as_one() -> None:
    assert {"enduser.role", "exception.escaped", "http.method", "gen_ai.system"} <= conventions.DEPRECATED
    assert not {"gen_ai.request.model", "http.route", "user.roles"} & conventions.DEPRECATED


def test_nothing_is_declared_twice() -> None:
    for section in ("attributes", "metrics", "events"):
        assert max(Counter(map(_id, _all(section))).values()) == 1
    assert max(Counter(map(_signal_id, [*_all("spans"), *_all("attribute_groups")])).values()) == 1
    for signal in SIGNALS:
        refs = [reference["ref"] for reference in signal.get("attributes", [])]
        assert len(refs) == len(set(refs)), _signal_id(signal)


@pytest.mark.parametrize("entry", _all("attributes"), ids=_id)
def test_an_attribute_keeps_to_the_policies(entry: dict[str, Any]) -> None:
    key = entry["key"]
    assert NAME.fullmatch(key)
    assert key.startswith(("llmops.", LATER)) or "." not in key, "ours begin with llmops."
    assert key not in conventions.ATTRIBUTES.keys() - CHANGED, "the conventions have it: refer to it"
    assert entry["brief"].endswith(".")
    kind = entry["type"]
    values = [member["value"] for member in kind["members"]] if isinstance(kind, dict) else []
    assert len(values) == len(set(values))
    assert len({member_id(value) for value in values}) == len(values)
    if kind == "string":
        assert entry["examples"]
    types = {"int": int, "double": float, "string": str, "string[]": list}
    for example in entry.get("examples", []):
        assert isinstance(example, types[kind])


def test_no_attribute_is_a_namespace_of_another() -> None:
    keys = {key for _, key in _references()} | {entry["key"] for entry in _all("attributes")}
    namespaces = {key[:at] for key in keys for at in range(len(key)) if key[at] == "."}
    assert keys & namespaces == COLLIDES


def test_the_attributes_of_spans_have_a_namespace() -> None:
    without = {ref for span in _all("spans") for ref in _refs(span) if "." not in ref}
    assert without == ON_SPANS


def _refs(signal: dict[str, Any]) -> list[str]:
    return [reference["ref"] for reference in signal["attributes"]]


@pytest.mark.parametrize("metric", _all("metrics"), ids=_id)
def test_a_metric_keeps_to_the_policies(metric: dict[str, Any]) -> None:
    assert NAME.fullmatch(metric["name"])
    assert metric["name"].startswith("llmops.")
    assert UNIT.fullmatch(metric["unit"])
    assert not UNIT_NAMES.search(metric["name"])
    assert metric["name"] not in conventions.ATTRIBUTES


def test_spans_events_and_groups_are_named_as_ours() -> None:
    for one in (*SPANS, *EVENTS, *GROUPS):
        assert one.id.startswith("llmops.")
        assert NAME.fullmatch(one.id)


def test_each_value_of_a_signal_is_one_of_the_attributes() -> None:
    members = {
        entry["key"]: {member["value"] for member in entry["type"]["members"]}
        for entry in _all("attributes")
        if isinstance(entry["type"], dict)
    }
    for signal in SIGNALS:
        for reference in signal.get("attributes", []):
            values = reference.get("annotations", {}).get("values", [])
            assert len(values) == len(set(values))
            assert set(values) <= members.get(reference["ref"], set(values)), (_signal_id(signal), reference)


def test_the_imported_metrics_are_those_of_the_conventions() -> None:
    known = {
        value
        for module in ("http_metrics", "gen_ai_metrics", "otel_metrics")
        for value in vars(import_module(f"opentelemetry.semconv._incubating.metrics.{module}")).values()
        if isinstance(value, str)
    }
    (groups,) = [content for content in FILES.values() if "imports" in content]
    assert set(groups["imports"]["metrics"]) <= known
