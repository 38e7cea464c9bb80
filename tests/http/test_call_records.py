"""What the record of a call says in the spool: where its time went, and what became of each attempt."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.recording.record import CallRecord, read_records
from tests.fakes.streams import Gate
from tests.fakes.upstream import Answer as Reply
from tests.fakes.upstream import FakeUpstream, Reset, Status, refusing_port
from tests.harness import AppUnderTest, running_app
from tests.http.streaming import stream
from tests.http.test_cache_sharing import Gated, in_flight


class Recorded:
    """An app whose records stay in its spool, as MLflow cannot be reached."""

    def __init__(self, app: AppUnderTest, folder: Path) -> None:
        self.app = app
        self.token = app.token()
        self._folder = folder

    def ask(self, **body: Any) -> CallRecord:
        """Make a call; its record."""
        answer = self.app.call(
            "POST", "/llm/generate", body={"prompt": "What is a trace?", **body}, token=self.token
        )
        return self.of(answer.request_id)

    def of(self, request_id: str) -> CallRecord:
        """The record of a request."""
        (found,) = (record for record in self.all if record.trace_id == request_id)
        return found

    @property
    def all(self) -> list[CallRecord]:
        """Every record, oldest first."""
        return [record for path in sorted(self._folder.glob("*.jsonl")) for record in read_records(path)[0]]


@contextmanager
def recorded(upstream: FakeUpstream, folder: Path, **values: Any) -> Iterator[Recorded]:
    given: dict[str, Any] = {"litellm_url": upstream.url, "retry_base_delay_s": 0.01, **values}
    with (
        refusing_port() as port,
        running_app(mlflow_tracking_uri=f"http://127.0.0.1:{port}", spool_path=str(folder), **given) as app,
    ):
        yield Recorded(app, folder)


def assert_in_order(record: CallRecord) -> None:
    """Each attempt begins when the one before it and its back-off are over, and ends within the call."""
    end_s = record.lookup_s or 0.0
    for attempt in record.tries:
        # Each number is rounded by itself.
        assert attempt.started_s >= end_s - 3e-6
        end_s = attempt.started_s + attempt.duration_s + attempt.wait_s
    assert end_s <= record.duration_s + 3e-6


def test_each_attempt_has_its_error_and_the_back_off_after_it(upstream: FakeUpstream, tmp_path: Path) -> None:
    with recorded(upstream, tmp_path, retry_max=2, cache_enabled=True) as it:
        upstream.script(Status(503), Reset(), Reply())
        record = it.ask()
    assert (record.outcome, record.attempts, record.route) == ("success", 3, "/llm/generate")
    assert [(each.error, each.cause, each.status) for each in record.tries] == [
        ("UpstreamError", None, 503),
        ("UpstreamError", "reset", None),
        (None, None, None),
    ]
    assert [each.wait_s > 0 for each in record.tries] == [True, True, False]
    assert_in_order(record)
    assert record.lookup_s is not None
    assert (record.error_reason, record.retry_ended, record.upstream_status) == (None, None, None)


def test_what_ended_the_retries_and_what_the_upstream_said(upstream: FakeUpstream, tmp_path: Path) -> None:
    with recorded(upstream, tmp_path, retry_max=1) as it:
        said = {"error": {"message": "too long", "code": "context_length_exceeded"}}
        upstream.script(Status(503), Status(503), Status(400, said))
        spent, refused = it.ask(), it.ask()
    assert (spent.error, spent.retry_ended, spent.upstream_status) == ("UpstreamError", "exhausted", 503)
    assert [each.wait_s > 0 for each in spent.tries] == [True, False]
    assert spent.error_reason
    assert (refused.error, refused.retry_ended, refused.upstream_status) == (
        "BadRequestError",
        "not_retryable",
        400,
    )
    assert [(each.error, each.status) for each in refused.tries] == [("BadRequestError", 400)]
    assert refused.lookup_s is None
    assert refused.upstream_code == "context_length_exceeded"


def test_a_call_that_the_breaker_refuses_has_no_attempt(upstream: FakeUpstream, tmp_path: Path) -> None:
    with refusing_port() as nobody:
        url = f"http://127.0.0.1:{nobody}"
        with recorded(upstream, tmp_path, litellm_url=url, breaker_failure_threshold=1) as it:
            unreachable, rejected = it.ask(), it.ask()
    assert [(each.error, each.cause) for each in unreachable.tries] == [("UpstreamTimeoutError", "refused")]
    assert (rejected.error, rejected.attempts, rejected.tries) == ("CircuitOpenError", 0, ())
    assert rejected.error_reason


def test_a_hit_says_how_old_its_answer_is_and_a_miss_how_long_the_look_up_took(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    with recorded(upstream, tmp_path, cache_enabled=True) as it:
        missed, hit = it.ask(), it.ask()
    assert (missed.cache_kind, missed.age_s, missed.shared, len(missed.tries)) == (None, None, False, 1)
    assert (hit.cache_kind, hit.shared, hit.tries) == ("exact", False, ())
    assert hit.age_s is not None
    for record in (missed, hit):
        assert record.lookup_s is not None
        assert 0 < record.lookup_s < record.duration_s


def test_an_answer_of_an_equal_call_is_shared(upstream: FakeUpstream, tmp_path: Path) -> None:
    gate = Gate()
    upstream.script(Gated(gate, Reply()))
    with recorded(upstream, tmp_path, cache_enabled=True) as it, ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(it.ask) for _ in range(2)]
        in_flight(it.app, 2)
        gate.allow()
        records = [future.result() for future in asking]
    paid, shared = sorted(records, key=lambda record: record.shared)
    assert (paid.cache, paid.shared, len(paid.tries)) == ("miss", False, 1)
    assert (shared.cache, shared.shared, shared.cache_kind, shared.tries) == ("hit", True, None, ())


def test_the_attempt_of_a_stream_lasts_as_long_as_the_stream(upstream: FakeUpstream, tmp_path: Path) -> None:
    with recorded(upstream, tmp_path) as it:
        answer = stream(it.app, it.token)
        record = it.of(answer.request_id)
    (attempt,) = record.tries
    assert record.first_chunk_s is not None
    assert attempt.started_s <= record.first_chunk_s <= attempt.started_s + attempt.duration_s + 3e-6
    assert attempt.error is None
    assert_in_order(record)


def test_cached_and_reasoning_tokens_are_kept(upstream: FakeUpstream, tmp_path: Path) -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "total_tokens": 150,
        "prompt_tokens_details": {"cached_tokens": 64},
        "completion_tokens_details": {"reasoning_tokens": 32},
    }
    with recorded(upstream, tmp_path) as it:
        upstream.script(Reply(extra={"usage": usage}))
        told, plain = it.ask(), it.ask()
    assert (told.cached_tokens, told.reasoning_tokens) == (64, 32)
    assert (plain.cached_tokens, plain.reasoning_tokens) == (None, None)
