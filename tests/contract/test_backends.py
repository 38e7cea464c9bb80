"""The collector and what stands behind it agree on what is too much, too late and too old.

Tempo and Loki do not run in the tests; here their configurations are held against what reaches them.
`tests/stack/test_limits.py` sends it.
"""

import re
from typing import Any, Final

import yaml

from deploy.backends import OTEL, ROOT
from service.telemetry.providers import MAX_ATTRIBUTE_CHARS

DOCKER_KILLS_AFTER_S: Final = 10
UTF8_BYTES_A_CHARACTER: Final = 4
UNITS: Final = {"s": 1, "m": 60, "h": 3600, "KB": 1024, "MB": 1024**2}


def read(name: str) -> dict[str, Any]:
    """One of the configurations."""
    found: dict[str, Any] = yaml.safe_load((OTEL / name).read_text(encoding="utf-8"))
    return found


COLLECTOR: Final = read("collector.yaml")
TEMPO: Final = read("tempo.yaml")
LOKI: Final = read("loki.yaml")
LIMITS: Final = LOKI["limits_config"]
BATCH: Final = COLLECTOR["exporters"]["otlp_http/loki"]["sending_queue"]["batch"]


def number(text: str) -> int:
    """A duration in seconds, or a size in bytes."""
    value, unit = re.fullmatch(r"(\d+)([a-zA-Z]+)", text).groups()  # type: ignore[union-attr]
    return int(value) * UNITS[unit]


def numbers(processor: str, pattern: str) -> set[int]:
    """The numbers that a pattern finds in a processor's statements."""
    return {
        int(found)
        for found in re.findall(pattern, yaml.safe_dump(COLLECTOR["processors"][processor], width=10**6))
    }


def test_a_late_trace_is_found_by_its_time() -> None:
    slack = number(TEMPO["live_store"]["wal"]["ingestion_time_range_slack"])
    # A night: what the queue keeps of a service that has little to do.
    assert slack >= 8 * 3600
    # Or a block of late traces is removed before it was completed.
    assert number(TEMPO["live_store"]["complete_block_timeout"]) >= slack
    # And the metrics of the same time are there.
    assert number(read("prometheus.yaml")["storage"]["tsdb"]["out_of_order_time_window"]) >= slack


def test_tempo_drops_no_trace_because_many_come_at_once() -> None:
    assert TEMPO["overrides"]["defaults"]["ingestion"]["max_traces_per_user"] == 0


def test_tempo_stops_before_docker_kills_it() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    grace_s = number(services["tempo"].get("stop_grace_period", f"{DOCKER_KILLS_AFTER_S}s"))
    # The rest of the stop writes what is in memory.
    assert number(TEMPO["backend_worker"]["finish_on_shutdown_timeout"]) <= grace_s / 2


def test_tempo_keeps_an_attribute_as_the_service_made_it() -> None:
    kept = TEMPO["distributor"]["max_attribute_bytes"]
    assert kept >= MAX_ATTRIBUTE_CHARS * UTF8_BYTES_A_CHARACTER
    assert numbers("transform/tempo_limits", r"attributes, (\d+)") == {kept}


def test_loki_takes_a_request_of_the_collector() -> None:
    # On the way between Loki's parts it has the names of each line's attributes once more.
    largest = 4 * BATCH["max_size"]
    assert BATCH["sizer"] == "bytes"
    assert largest < LIMITS["ingestion_burst_size_mb"] * UNITS["MB"]
    assert largest < number(LIMITS["per_stream_rate_limit_burst"])
    assert largest < LOKI["server"]["grpc_server_max_recv_msg_size"]
    assert largest < LOKI["server"]["grpc_server_max_send_msg_size"]


def test_loki_takes_a_record_as_the_collector_cuts_it() -> None:
    (line,) = numbers("transform/loki_limits", r"Substring\(log\.body, 0, (\d+)")
    assert line < number(LIMITS["max_line_size"])
    assert LIMITS["max_line_size_truncate"] is True
    (attributes,) = numbers("filter/loki_limits", r"Len\(String\(attributes\)\) > (\d+)")
    (scope,) = numbers("transform/loki_limits", r"Len\(String\(scope\.attributes\)\) > (\d+)")
    assert attributes + scope < number(LIMITS["max_structured_metadata_size"])
    # No number of attributes: what has the size has any number of them.
    assert LIMITS["max_structured_metadata_entries_count"] == 0


def test_loki_takes_a_record_as_old_as_the_collector_lets_pass() -> None:
    (dropped_h,) = numbers("filter/loki_limits", r'Duration\("(\d+)h"\)')
    # The queue keeps it for a while, too.
    assert dropped_h * 3600 + 12 * 3600 <= number(LIMITS["reject_old_samples_max_age"])
    assert number(LIMITS["reject_old_samples_max_age"]) <= number(LIMITS["retention_period"])
    assert LIMITS["shard_streams"]["time_sharding_enabled"] is True


def test_loki_finds_a_late_line_at_once() -> None:
    assert LOKI["ingester"]["query_store_max_look_back_period"] == -1


def test_lines_and_measurements_are_sent_one_after_another() -> None:
    for exporter in ("otlp_http/loki", "otlp_http/prometheus"):
        assert COLLECTOR["exporters"][exporter]["sending_queue"]["num_consumers"] == 1
