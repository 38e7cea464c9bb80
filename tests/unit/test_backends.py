"""The configuration of a container, moved to this machine; and names in Prometheus."""

import pytest

from deploy.backends import OTEL, compose_command, with_addresses
from grafana import series
from service.telemetry import names
from service.telemetry.names import Metric


def test_only_addresses_are_replaced() -> None:
    text = "a: collector:8888\nb: localhost:9090\nc: collector\n"
    moved = with_addresses(text, {"collector:8888": "127.0.0.1:1", "localhost:9090": "127.0.0.1:2"})
    assert moved == "a: 127.0.0.1:1\nb: 127.0.0.1:2\nc: collector\n"


def test_an_address_that_begins_another_does_not_spoil_it() -> None:
    assert with_addresses("x:1 x:12", {"x:1": "a", "x:12": "b"}) == "a b"


def test_an_address_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(LookupError, match="gone:1"):
        with_addresses("here:1", {"gone:1": "x"})


def test_the_committed_configuration_has_nothing_but_its_addresses_changed() -> None:
    text = (OTEL / "prometheus.yaml").read_text(encoding="utf-8")
    moved = with_addresses(text, {"tempo:3200": "127.0.0.1:9"})
    different = [
        (old, new) for old, new in zip(text.splitlines(), moved.splitlines(), strict=True) if old != new
    ]
    assert different == [("      - targets: [tempo:3200]", "      - targets: [127.0.0.1:9]")]


def test_prometheus_gets_the_arguments_of_compose() -> None:
    assert "--web.enable-otlp-receiver" in compose_command("prometheus")


@pytest.mark.parametrize(
    ("kind", "unit", "expected"),
    [
        ("counter", "{call}", ("a_b_total",)),
        ("counter", "USD", ("a_b_USD_total",)),
        ("gauge", "1", ("a_b_ratio",)),
        ("gauge", "s", ("a_b_seconds",)),
        ("up_down_counter", "{request}", ("a_b",)),
        ("histogram", "s", ("a_b_seconds_bucket", "a_b_seconds_count", "a_b_seconds_sum")),
        ("histogram", "1", ("a_b_bucket", "a_b_count", "a_b_sum")),
    ],
)
def test_a_metrics_name_in_prometheus(kind: str, unit: str, expected: tuple[str, ...]) -> None:
    assert series.series_of(Metric("a.b", kind, unit, "x")) == expected  # type: ignore[arg-type]  # a literal


def test_what_is_not_declared_cannot_be_asked_for() -> None:
    with pytest.raises(LookupError, match="nobody"):
        series.value(names.LLM_CALLS, nobody="x")
    with pytest.raises(LookupError, match="succes"):
        series.value(names.LLM_CALLS, outcome="succes")
    with pytest.raises(LookupError, match="nobody"):
        series.by(names.LLM_CALLS, "nobody")
    with pytest.raises(ValueError, match="histogram"):
        series.value(names.EVENT_LOOP_LAG)
    with pytest.raises(ValueError, match="not a histogram"):
        series.bucket(names.LLM_CALLS)
