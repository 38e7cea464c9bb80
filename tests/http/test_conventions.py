"""What the conventions want of the telemetry, and what the SDK and the instrumentation would do otherwise."""

from opentelemetry.trace import StatusCode

from tests.fakes.upstream import FakeUpstream, Reset
from tests.harness import AppUnderTest
from tests.http.support import attributes, trace_of


def units(app: AppUnderTest) -> dict[str, str]:
    """The unit of each metric."""
    data = app.metrics_out.get_metrics_data()
    return {
        metric.name: metric.unit or ""
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def test_the_queues_of_the_sdk_are_counted_in_the_units_of_their_capacities(service: AppUnderTest) -> None:
    found = units(service)
    for signal, unit in (("log", "{log_record}"), ("span", "{span}")):
        for what in ("size", "capacity"):
            assert found[f"otel.sdk.processor.{signal}.queue.{what}"] == unit


def test_a_request_that_failed_has_its_errors_type_and_no_stack_trace(
    service: AppUnderTest, upstream: FakeUpstream
) -> None:
    upstream.script(Reset())
    answer = service.call("POST", "/llm/generate", body={"prompt": "x"}, token=service.token())

    assert answer.status == 502
    (request,) = [span for span in trace_of(service, answer.request_id) if span.name == "POST"]
    assert attributes(request)["error.type"]
    assert request.status.status_code is StatusCode.ERROR
    assert not request.events


def test_the_resource_has_nothing_that_a_restart_changes_or_that_may_hold_a_secret(
    service: AppUnderTest,
) -> None:
    resource = service.telemetry.tracer_provider.resource.attributes
    assert "process.pid" in resource
    assert not resource.keys() & {
        "process.command_args",
        "process.command_line",
        "process.runtime.description",
    }
