"""SIGKILL in the middle of load: each call that was answered is in MLflow or on disk, and in the end once."""

from pathlib import Path

import pytest

from tests.e2e.recording import (
    Load,
    assert_each_once,
    end_of,
    ids_in_spool,
    in_spool,
    kill,
    left_in,
    start_replay,
    until,
    variables,
)
from tests.e2e.support import stopped
from tests.fakes.mlflow import FakeMlflow
from tests.fakes.upstream import FakeUpstream
from tests.harness import ServiceProcess

pytestmark = pytest.mark.e2e

CALLS = 400
SEGMENT_RECORDS = 100
"""What a crash can make somebody send again, at most."""


def killed_under_load(given: dict[str, str]) -> tuple[ServiceProcess, Load]:
    """Start a service, load it, kill it while it works."""
    with ServiceProcess(given) as process:
        process.wait_ready()
        load = Load(process)
        with load.running():
            load.wait_for(CALLS)
            kill(process)
    assert load.statuses == {200}
    assert len(load.answered) >= CALLS
    return process, load


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def dead_mlflow(mlflow: FakeMlflow) -> FakeMlflow:
    mlflow.down()
    return mlflow


def test_killed_with_mlflow_up_the_next_start_sends_the_rest(
    upstream: FakeUpstream, mlflow: FakeMlflow, spool: Path
) -> None:
    given = variables(upstream.url, mlflow.url, spool)
    _, load = killed_under_load(given)
    assert load.answered <= ids_in_spool(spool) | mlflow.request_ids

    with ServiceProcess(given) as process:
        process.wait_ready()
        mlflow.wait_for(lambda fake: bool(fake.runs) and fake.runs[0].status == "FAILED")
        assert_each_once(mlflow, load)
        assert mlflow.repeats <= SEGMENT_RECORDS
        with Load(process).running() as second:
            second.wait_for(50)
        stopped(process)
    load.answered |= second.answered
    load.unanswered |= second.unanswered
    assert_each_once(mlflow, load)
    assert [run.status for run in mlflow.runs] == ["FAILED", "FINISHED"]
    assert left_in(spool) == []


def test_killed_with_mlflow_dead_all_is_on_disk_and_replay_sends_it(
    upstream: FakeUpstream, dead_mlflow: FakeMlflow, spool: Path
) -> None:
    given = variables(upstream.url, dead_mlflow.url, spool)
    process, load = killed_under_load(given)
    assert load.answered <= ids_in_spool(spool) <= load.answered | load.unanswered
    recorded = len(in_spool(spool))

    with ServiceProcess(process.environment, arguments=("-m", "service", "replay")) as refused:
        assert refused.process is not None
        assert refused.process.wait(30) == 1
        assert "MLflow does not take the records: Connection error" in refused.lines()[-1]["message"]
    assert len(in_spool(spool)) == recorded

    dead_mlflow.up()
    with ServiceProcess(process.environment, arguments=("-m", "service", "replay")) as replay:
        assert replay.process is not None
        assert replay.process.wait(30) == 0
        assert replay.lines()[-1]["message"] == "Nothing is left to replay"
        assert replay.lines()[-1]["records"] == recorded
    assert_each_once(dead_mlflow, load)
    assert dead_mlflow.repeats == 0
    order = [kept.span.end_ns for kept in dead_mlflow.kept]
    assert order[0] < order[-1]
    assert [run.status for run in dead_mlflow.runs] == ["FAILED"]
    assert list(spool.iterdir()) == []


def test_two_replays_at_once_and_one_that_dies_half_way(
    upstream: FakeUpstream, dead_mlflow: FakeMlflow, spool: Path
) -> None:
    given = variables(upstream.url, dead_mlflow.url, spool)
    _, first = killed_under_load(given)
    process, load = killed_under_load(given)
    load.answered |= first.answered
    load.unanswered |= first.unanswered
    recorded = len(in_spool(spool))

    dead_mlflow.delay_s = 0.1
    dead_mlflow.up()
    process.folder = str(spool.parent)
    dying = start_replay(process)
    dead_mlflow.wait_for(lambda fake: len(fake.kept) >= SEGMENT_RECORDS)
    dying.kill()
    dying.communicate()
    sent = len(dead_mlflow.kept)
    assert sent < recorded
    ends = [end_of(replaying) for replaying in (start_replay(process), start_replay(process))]
    assert [status for status, _ in ends] == [0, 0]
    assert_each_once(dead_mlflow, load)
    assert len(dead_mlflow.kept) == recorded
    # What the dying one sent last it may not have struck off; the two others took nothing from each other.
    assert sum(lines[-1]["records"] for _, lines in ends) == recorded - sent + dead_mlflow.repeats
    assert dead_mlflow.repeats <= SEGMENT_RECORDS
    assert [run.status for run in dead_mlflow.runs] == ["FAILED", "FAILED"]
    assert list(spool.iterdir()) == []


def test_a_spool_cut_in_the_middle_of_a_line_costs_that_line_only(
    upstream: FakeUpstream, dead_mlflow: FakeMlflow, spool: Path
) -> None:
    process, load = killed_under_load(variables(upstream.url, dead_mlflow.url, spool))
    *_, before_last, last = sorted(spool.glob("*.jsonl"))
    whole = ids_in_spool(spool)
    last.write_bytes(last.read_bytes()[:-20])
    before_last.write_bytes(before_last.read_bytes() + b'{"trace_id":"4bf92f35')
    cut = whole - ids_in_spool(spool)
    assert len(cut) == 1

    dead_mlflow.up()
    process.folder = str(spool.parent)
    status, lines = end_of(start_replay(process))
    assert status == 0, lines
    assert dead_mlflow.request_ids == whole - cut
    assert load.answered - cut <= dead_mlflow.request_ids


def test_an_answer_of_mlflow_that_gets_lost_repeats_no_call(
    upstream: FakeUpstream, mlflow: FakeMlflow, spool: Path
) -> None:
    mlflow.lose_answers = 2
    with ServiceProcess(variables(upstream.url, mlflow.url, spool)) as process:
        process.wait_ready()
        load = Load(process)
        with load.running():
            load.wait_for(CALLS)
        until(lambda: not in_spool(spool), "an empty spool")
        stopped(process)
    assert_each_once(mlflow, load)
    assert 0 < mlflow.repeats <= 2 * SEGMENT_RECORDS
