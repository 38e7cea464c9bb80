"""The run of a process on disk and on the server, its totals and parameters; the count of losses."""

import json
from pathlib import Path

import pytest

from service.config.settings import Settings
from service.recording.delivery import RecordCounts
from service.recording.mlflow import Run
from service.recording.run import LATENCIES, ProcessRun, Totals, params_of
from tests.fakes.clock import FakeClock
from tests.harness import make_settings
from tests.unit.recording import FakeTracker, make_record
from tests.unit.resilience import Readable

MOST_PARAMS = 100
"""So many the server takes at once."""


def test_a_run_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    run = ProcessRun("name", 5, {"version": "1"}, "run-1", "2", described=True, totals={"calls": 3.0})
    run.status, run.ended_ms = "FINISHED", 9
    run.save(tmp_path / "run.json")
    assert ProcessRun.load(tmp_path / "run.json", "other", 0) == run
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"colour": 1}'])
def test_an_invalid_file_gives_a_new_run(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    assert ProcessRun.load(path, "name", 5) == ProcessRun("name", 5)
    assert ProcessRun.load(tmp_path / "none", "name", 5) == ProcessRun("name", 5)


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"name": "name", "started_ms": 5, "status": "FINISHED", "colour": "blue"}))
    assert ProcessRun.load(path, "other", 0) == ProcessRun("name", 5, status="FINISHED")


def test_a_failure_to_save_is_ignored_and_leaves_no_file(tmp_path: Path) -> None:
    run = ProcessRun("name", 5)
    run.save(tmp_path / "nowhere" / "run.json")
    # The draft can be written, but not renamed.
    (tmp_path / "run.json").mkdir()
    run.save(tmp_path / "run.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_is_created_and_described_once() -> None:
    tracker, run = FakeTracker(), ProcessRun("name", 5, {"version": "1"})
    assert run.on_server(tracker) == run.on_server(tracker) == Run("run-1", "1")
    assert [(kept.name, kept.params) for kept in tracker.runs.values()] == [("name", {"version": "1"})]


def test_totals_add_up() -> None:
    totals = Totals()
    assert totals.metrics == {}
    totals.add(make_record(prompt_tokens=10, completion_tokens=5, cost=0.25, cache="miss"))
    totals.add(make_record(outcome="error", error="UpstreamError"))
    totals.add(make_record(outcome="cancelled"))
    totals.add(make_record(outcome="cached", cache="hit", saved_cost=0.5))
    found = totals.metrics
    assert {name: found[name] for name in found if not name.startswith("latency")} == {
        "calls": 4,
        "calls_success": 1,
        "calls_error": 1,
        "calls_cancelled": 1,
        "calls_cached": 1,
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "cost_usd": 0.25,
        "saved_usd": 0.5,
        "cache_hits": 1,
    }


def test_quantiles_are_of_the_latest_calls() -> None:
    totals = Totals()
    for _call in range(50):
        totals.add(make_record(duration_s=1_000.0))
    for number in range(LATENCIES):
        totals.add(make_record(duration_s=number / 100))
    found = totals.metrics
    assert (found["latency_p50_s"], found["latency_p95_s"], found["latency_p99_s"]) == (50.0, 95.0, 99.0)
    assert found["calls"] == LATENCIES + 50


def test_parameters_hold_the_settings_and_no_secret() -> None:
    settings = make_settings(
        litellm_api_key="sk-canary-1",
        qdrant_api_key="canary-2",
        valkey_url="valkey://:canary-3@valkey",
        rate_limit="7/minute",
    )
    shown = params_of(settings, "1.2.3")
    assert (shown["version"], shown["rate_limit"]) == ("1.2.3", "7/minute")
    secret = {
        name: value.get_secret_value()
        for name in Settings.model_fields
        if hasattr(value := getattr(settings, name), "get_secret_value")
    }
    assert {"jwt_secret_key", "litellm_api_key", "qdrant_api_key", "auth_admin_password"} <= set(secret)
    assert not set(secret) & set(shown)
    assert not [value for value in secret.values() if value in json.dumps(dict(shown))]
    assert len(shown) <= MOST_PARAMS


def test_losses_are_counted_and_logged_once_a_minute(
    metrics: Readable, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock(1_000.0)
    counts = RecordCounts(metrics.instruments, clock)
    counts.lost(1, "first")
    counts.lost(2, "second")
    clock.advance(59)
    counts.lost(3, "third")
    counts.log_losses(at_once=False)
    assert logged(caplog) == [(1, "first")]
    # Earlier losses are logged though nothing more is lost.
    clock.advance(1)
    counts.log_losses(at_once=False)
    counts.log_losses(at_once=False)
    assert logged(caplog) == [(1, "first"), (5, "third")]
    counts.lost(4, "fourth")
    counts.log_losses()
    counts.log_losses()
    assert logged(caplog) == [(1, "first"), (5, "third"), (4, "fourth")]
    assert metrics.value("llmops.recorder.lost") == 10
    assert set(caplog.messages) == {"Records of calls are lost"}


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(vars(record)["records"], vars(record)["reason"]) for record in caplog.records]
