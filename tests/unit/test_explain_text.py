"""What a terminal shows: nothing that controls it."""

import asyncio
from pathlib import Path

from service.explain.explainer import Explainer
from service.explain.links import Links
from service.explain.text import text
from service.recording.mlflow import NoTracker
from service.recording.recent import RecentRequests
from service.recording.record import AttemptRecord, CallRecord
from service.recording.request_key import RequestKey


def test_a_hostile_name_controls_no_terminal(tmp_path: Path) -> None:
    record = CallRecord(
        trace_id="1" * 32,
        span_id="2" * 16,
        operation="chat",
        started_ns=1,
        duration_s=2.0,
        user="\x1b[2J\x9b31m\u202eresu",
        model="demo\r\nfake line",
        outcome="error",
        error="UpstreamError",
        tries=(
            AttemptRecord(started_s=0.0, duration_s=0.5, error="UpstreamError", status=503, wait_s=0.5),
            AttemptRecord(started_s=1.0, duration_s=1.0, error="UpstreamError", cause="reset"),
        ),
    )
    recent = RecentRequests()
    recent.keep_call(record, record.as_line())
    explainer = Explainer(recent, tmp_path, NoTracker(), Links())
    shown = text(asyncio.run(explainer.explain(RequestKey("request", "1" * 32), "", sees_all=True)))

    assert all(line.isprintable() for line in shown.split("\n"))
    assert "\nfake line" not in shown
    assert (
        "  attempt 1     |xxxxxxxxxx..........                    | UpstreamError 503, 500.0 ms; then a"
        in shown
    )
    assert "  attempt 2     |                    xxxxxxxxxxxxxxxxxxxx| UpstreamError reset, 1.00 s" in shown
