"""What Tempo and Loki would refuse, and the order of lines after an outage.

The receivers take everything; each test holds what they got against the limits of the real programs, which
otel/README.md lists with their sources.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
import yaml
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs

from deploy import backends
from tests.fakes.otlp import Log
from tests.harness import request
from tests.stack.api import until
from tests.stack.world import World

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

LINE_BYTES = 256 * 1024
"""Loki: max_line_size."""
METADATA_BYTES = 64 * 1024
"""Loki: max_structured_metadata_size, of a record's attributes with its resource's and its scope's."""
LABEL_BYTES = 2048
"""Loki: max_label_value_length."""
MESSAGE_BYTES = 4 * 1024 * 1024
"""Tempo: what its receiver takes at once by gRPC."""
PUSH_BYTES = 6_000_000
"""Loki: the burst of its ingestion rate by default. A request of more is told to come again, for ever."""
FILTERED = "otelcol_processor_filter_logs_filtered_total"
DAY_S = 24 * 3600


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("limits"), with_models=False) as found:
        yield found


@pytest.fixture(autouse=True)
def emptied(world: World) -> None:
    world.loki.clear()
    world.tempo.clear()


def record(body: Any, attributes: Mapping[str, Any] | None = None, *, age_s: float = 0) -> dict[str, Any]:
    """A log record in OTLP's JSON; a body or value that is no text is given as it stands there."""
    return {
        "timeUnixNano": str(time.time_ns() - int(age_s * 1e9)),
        "body": _value(body),
        "attributes": _pairs(attributes or {}),
    }


def _value(value: Any) -> dict[str, Any]:
    return {"stringValue": value} if isinstance(value, str) else value


def fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """A value of several, in OTLP's JSON."""
    return {"kvlistValue": {"values": _pairs(values)}}


def _pairs(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def send_logs(
    world: World, records: Iterable[dict[str, Any]], resource: Mapping[str, Any] | None = None
) -> None:
    """Send records to the collector in one request."""
    scope_logs = [{"scope": {"name": "test"}, "logRecords": list(records)}]
    attributes = {"service.name": "llmops-api", **(resource or {})}
    _post(
        world,
        "logs",
        {"resourceLogs": [{"resource": {"attributes": _pairs(attributes)}, "scopeLogs": scope_logs}]},
    )


def _post(world: World, signal: str, body: Any) -> None:
    answer = request(world.ports.http, "POST", f"/v1/{signal}", body=body)
    assert answer.status == 200, answer.body


def metadata_bytes(log: Log) -> int:
    """The size of what Loki makes structured metadata of, as it counts it."""
    kept = {key: value for key, value in log.resource.items() if action(key) == "structured_metadata"}
    # Its name for a list is JSON, which is not longer than this.
    return sum(
        len(key.encode()) + len(str(value).encode()) for key, value in {**kept, **log.attributes}.items()
    )


def action(key: str) -> str:
    """What otel/loki.yaml has Loki do with an attribute of a resource: the first that fits."""
    limits = yaml.safe_load((backends.OTEL / "loki.yaml").read_text(encoding="utf-8"))["limits_config"]
    for rule in limits["otlp_config"]["resource_attributes"]["attributes_config"]:
        if key in rule.get("attributes", ()) or ("regex" in rule and re.fullmatch(rule["regex"], key)):
            return str(rule["action"])
    return "structured_metadata"


def counted(world: World, name: str) -> float:
    """The sum of a metric's series on the collector's own page."""
    page = request(world.ports.metrics, "GET", "/metrics").body.decode()
    lines = [line for line in page.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def bodies(world: World) -> list[str]:
    """The lines that Loki's place got, in the order in which it got them."""
    return [str(log.body) for log in world.loki.logs()]


def test_lines_keep_their_order_through_an_outage(world: World) -> None:
    world.loki.answer_status = 503
    sent = []
    # More than the queue gives to one request, so that several would be on their way at once.
    for part in range(40):
        lines = [f"{part:03} {number:03} {'x' * 4000}" for number in range(100)]
        send_logs(world, map(record, lines))
        sent += lines
    until(lambda: world.loki.exports >= 2, "an attempt and another", 30)
    world.loki.answer_status = 200
    until(lambda: len(bodies(world)) >= len(sent), "all lines", 60)
    assert [line[:7] for line in bodies(world)] == [line[:7] for line in sent]


@pytest.mark.parametrize(
    "careless",
    [
        pytest.param(lambda: record("l" * 300_000), id="a long line"),
        pytest.param(lambda: record("é" * 150_000), id="a long line of other letters"),
        pytest.param(
            lambda: record({"kvlistValue": {"values": _pairs({"a": "m" * 300_000})}}),
            id="a long line of fields",
        ),
        pytest.param(lambda: record("one value", {"one": "v" * 70_000}), id="a large attribute"),
        pytest.param(
            lambda: record("many values", {f"key.{n}": "v" * 700 for n in range(100)}), id="many attributes"
        ),
        pytest.param(
            lambda: record("a list", {"list": {"arrayValue": {"values": [_value("v" * 100)] * 700}}}),
            id="a large list",
        ),
        pytest.param(lambda: record("fields", {"map": fields({"a": "v" * 70_000})}), id="large fields"),
        pytest.param(
            lambda: record("no name", {"": "v", "-.-": "w", "ключ": "z"}), id="keys that make no name"
        ),
    ],
)
def test_a_record_that_does_not_fit_is_cut(world: World, careless: Any) -> None:
    send_logs(world, [record("before"), careless(), record("after")])
    until(lambda: "after" in bodies(world), "the last")
    first, cut, last = world.loki.logs()
    assert (first.body, last.body) == ("before", "after")
    # There, and such that Loki takes it: not refused, not thrown away.
    assert 0 < len(str(cut.body).encode()) <= LINE_BYTES
    assert metadata_bytes(cut) <= METADATA_BYTES
    assert all(any(c.isascii() and c.isalnum() for c in key) for key in cut.attributes)
    assert cut.body == careless_body(careless) or str(cut.body).endswith("... (truncated)")


def careless_body(careless: Any) -> str | None:
    """The text that was sent as the body, if it was text."""
    text: str | None = careless()["body"].get("stringValue")
    return text


def test_what_identifies_a_failure_outlives_the_cut(world: World) -> None:
    traceback = "".join(f"  File {n}, in call\n" for n in range(8000)) + "ValueError: the reason"
    telling = {
        "event.name": "llmops.retry.exhausted",
        "error.type": "upstream_timeout",
        "request_id": "0af7651916cd43dd8448eb211c80319c",
        "exception.type": "ValueError",
    }
    many = {f"key.{n}": "v" * 2000 for n in range(60)}
    send_logs(world, [record("failed", {**many, **telling, "exception.stacktrace": traceback})])
    until(world.loki.logs, "the record")
    (log,) = world.loki.logs()
    assert metadata_bytes(log) <= METADATA_BYTES
    assert {key: log.attributes[key] for key in telling} == telling
    assert log.attributes["exception.stacktrace"].endswith("ValueError: the reason")


def test_a_record_that_fits_stays_as_it_is(world: World) -> None:
    attributes = {"text": "é" * 10_000, "list": {"arrayValue": {"values": [_value("a"), _value("b")]}}}
    send_logs(world, [record("l" * 60_000, attributes)])
    until(world.loki.logs, "the record")
    (log,) = world.loki.logs()
    assert log.body == "l" * 60_000
    assert log.attributes == {"text": "é" * 10_000, "list": ["a", "b"]}


@pytest.mark.parametrize("age_s", [7.5 * DAY_S, -900], ids=["a week ago", "in a quarter of an hour"])
def test_a_record_of_another_time_is_dropped_alone_and_counted(world: World, age_s: float) -> None:
    before = counted(world, FILTERED)
    send_logs(world, [record("before"), record("astray", age_s=age_s), record("after")])
    until(lambda: "after" in bodies(world), "the last")
    assert bodies(world) == ["before", "after"]
    assert counted(world, FILTERED) == before + 1


def test_yesterdays_record_arrives(world: World) -> None:
    send_logs(world, [record("yesterday", age_s=DAY_S)])
    until(lambda: bodies(world) == ["yesterday"], "the record")


def test_a_resource_that_does_not_fit_is_cut(world: World) -> None:
    resource = {"service.name": "s" * 5000, "": "v", **{f"key.{n}": "v" * 5000 for n in range(40)}}
    send_logs(world, [record("line")], resource)
    until(world.loki.logs, "the record")
    (log,) = world.loki.logs()
    assert len(log.resource["service.name"]) <= LABEL_BYTES
    assert "" not in log.resource
    assert metadata_bytes(log) <= METADATA_BYTES


def test_no_request_to_loki_is_over_its_burst(world: World) -> None:
    # As many tracebacks as a failing upstream makes while Loki is away.
    world.loki.answer_status = 503
    for _ in range(10):
        send_logs(world, [record("failed", {"exception.stacktrace": "t" * 20_000}) for _ in range(100)])
    until(lambda: world.loki.exports, "an attempt", 30)
    world.loki.answer_status = 200
    until(lambda: len(bodies(world)) == 1000, "all records", 60)
    assert max(map(len, world.loki.raw)) < PUSH_BYTES


def test_a_line_brings_little_of_its_resource(world: World) -> None:
    # Loki writes it to each line: a small request would become one that its parts cannot hand to each other.
    resource = {f"process.{n}": "v" * 1000 for n in range(40)} | {
        "service.instance.id": "i",
        "service.version": "1",
    }
    send_logs(world, [record("line")], resource)
    until(world.loki.logs, "the record")
    (log,) = world.loki.logs()
    assert metadata_bytes(log) < 200


def test_a_measurement_of_half_a_day_ago_is_taken(world: World) -> None:
    until(lambda: world.api.query("up", time.time()), "Prometheus to have measured something since", 60)
    then = time.time() - 11 * 3600
    point = {"timeUnixNano": str(int(then * 1e9)), "asDouble": 1}
    metrics = [{"name": "late", "gauge": {"dataPoints": [point]}}]
    _post(world, "metrics", {"resourceMetrics": [{"scopeMetrics": [{"metrics": metrics}]}]})
    until(lambda: world.api.query("late", then + 1), "the measurement", 30)


def test_no_message_to_tempo_is_over_what_it_takes(world: World) -> None:
    now = time.time_ns()
    spans = [
        {
            "traceId": f"{number:032x}",
            "spanId": f"{number:016x}",
            "name": "failed",
            "startTimeUnixNano": str(now),
            "endTimeUnixNano": str(now + 1),
            "attributes": _pairs({"a": "v" * 5000}),
            "status": {"code": 2},
        }
        for number in range(1, 2001)
    ]
    # One alone is over what a message may be, and would leave no room for its neighbours.
    spans[1000]["attributes"] = _pairs({"huge": "v" * 5_000_000})
    spans[1001]["events"] = [
        {"timeUnixNano": str(now), "name": "e", "attributes": _pairs({"huge": "v" * 5_000_000})}
    ]
    for start in range(0, 2000, 200):
        part = [{"spans": spans[start : start + 200]}]
        resource = {"attributes": _pairs({"service.name": "llmops-api"})}
        _post(world, "traces", {"resourceSpans": [{"resource": resource, "scopeSpans": part}]})
    until(lambda: len(world.tempo.spans()) == 2000, "all spans", 90)
    assert max(map(len, world.tempo.raw)) < MESSAGE_BYTES


def test_the_collector_takes_by_grpc_what_it_takes_by_http(world: World) -> None:
    # A process hands over 512 records at once, whichever protocol it is told to use.
    value = AnyValue(string_value="t" * 15_000)
    records = [LogRecord(attributes=[KeyValue(key="exception.stacktrace", value=value)]) for _ in range(512)]
    logs = ResourceLogs(scope_logs=[ScopeLogs(log_records=records)])
    message = ExportLogsServiceRequest(resource_logs=[logs]).SerializeToString()
    assert len(message) > MESSAGE_BYTES
    with grpc.insecure_channel(f"{backends.HOST}:{world.ports.grpc}") as channel:
        channel.unary_unary("/opentelemetry.proto.collector.logs.v1.LogsService/Export")(message, timeout=10)
    until(lambda: len(bodies(world)) == 512, "all records")
