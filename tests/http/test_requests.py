"""`GET /requests/{id}` says what became of a request, to its caller and to administrators alone."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.behaviours import Answer, Reset, Status, Stream
from tests.fakes.mlflow import FakeMlflow
from tests.fakes.upstream import FakeUpstream, refusing_port
from tests.harness import Answer as Reply
from tests.harness import AppUnderTest, running_app
from tests.http.streaming import calling
from tests.http.support import TraceParent, completed_line

PAGE = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
UNKNOWN = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def app(upstream: FakeUpstream, tmp_path: Path) -> Iterator[AppUnderTest]:
    with serving(upstream, tmp_path) as served:
        yield served


@contextmanager
def serving(upstream: FakeUpstream, spool: Path, **values: Any) -> Iterator[AppUnderTest]:
    """An app whose records wait on disk, as MLflow is down."""
    given: dict[str, Any] = {"litellm_url": upstream.url, "retry_base_delay_s": 0.01, **values}
    with (
        refusing_port() as port,
        running_app(mlflow_tracking_uri=f"http://127.0.0.1:{port}", spool_path=str(spool), **given) as served,
    ):
        yield served


def generate(app: AppUnderTest, token: str, body: Any = None, **options: Any) -> Reply:
    return app.call(
        "POST", "/llm/generate", body=body or {"prompt": "What is a trace?"}, token=token, **options
    )


def explained(app: AppUnderTest, identifier: str, token: str) -> Any:
    """The answer in JSON."""
    answer = app.call("GET", f"/requests/{identifier}", token=token)
    assert answer.status == 200, answer.body
    assert answer.headers["cache-control"] == "no-store"
    return answer.json


def the_one(app: AppUnderTest, identifier: str, token: str) -> Any:
    """The one request of an id."""
    found = explained(app, identifier, token)
    (request,) = found["requests"]
    assert not found["more"]
    return request


def test_a_success_after_two_retries(upstream: FakeUpstream, tmp_path: Path) -> None:
    with serving(upstream, tmp_path, retry_max=2, cache_enabled=True) as app:
        upstream.script(Status(503), Reset(), Answer())
        token = app.token()
        answer = generate(app, token)
        request = the_one(app, answer.request_id, token)
        assert request == the_one(app, request["record_id"], token)
        assert request == the_one(app, request["incident_id"], token)
        hit = the_one(app, generate(app, token).request_id, token)

    assert request["summary"].startswith("The model answered after 2 retries, in ")
    assert (request["outcome"], request["route"], request["model"]) == ("success", "/llm/generate", "demo")
    assert (request["user"], request["cost"], request["tokens"]["total"]) == ("user", 0.00042, 30)
    assert [(each["error"], each["status"], each["cause"]) for each in request["attempts"]] == [
        ("UpstreamError", 503, None),
        ("UpstreamError", None, "reset"),
        (None, None, None),
    ]
    assert [each["wait_s"] > 0 for each in request["attempts"]] == [True, True, False]
    times = request["times"]
    assert 0 < times["llm_s"] + times["retry_s"] <= times["total_s"]
    assert (request["error"], request["cache"]["result"]) == (None, "miss")
    assert request["record_id"] == f"tr-{answer.request_id}"
    assert request["waits_in_spool"], "MLflow is down"
    assert (hit["outcome"], hit["cache"]["kind"], hit["cost"]) == ("cached", "exact", 0.0)
    assert hit["cache"]["saved_cost"] == 0.00042
    assert hit["attempts"] == []


def test_a_422_says_whose_fault_it_is_and_what_to_do(app: AppUnderTest) -> None:
    token = app.token()
    answer = generate(app, token, {"prompt": "hello", "temperature": "canary"})
    assert answer.status == 422
    request = the_one(app, answer.json["incident_id"], token)

    assert request == the_one(app, answer.request_id, token)
    error = request["error"]
    assert (error["name"], error["status"], error["fault"]) == ("ValidationError", 422, "caller")
    assert error["retry"] is False
    assert error["message"] == answer.json["message"]
    assert error["fields"] == ["body.temperature: float_type"]
    assert error["meaning"]
    assert error["advice"]
    assert (request["method"], request["route"], request["status"]) == ("POST", "/llm/generate", 422)
    assert (request["model"], request["record_id"], request["attempts"]) == (None, None, [])
    assert "canary" not in json.dumps(request)


def test_a_failure_has_its_attempts_and_what_the_answer_said(upstream: FakeUpstream, tmp_path: Path) -> None:
    with serving(upstream, tmp_path, retry_max=1) as app:
        upstream.script(Status(500), Status(500))
        token = app.token()
        answer = generate(app, token)
        request = the_one(app, answer.json["incident_id"], token)
    error = request["error"]
    assert (error["name"], error["fault"], error["retry"]) == ("UpstreamError", "upstream", True)
    assert (error["message"], error["upstream_status"]) == (answer.json["message"], 500)
    assert (request["status"], len(request["attempts"]), request["retry_ended"]) == (502, 2, "exhausted")


def test_a_breakers_refusal(upstream: FakeUpstream, tmp_path: Path) -> None:
    with serving(upstream, tmp_path, breaker_failure_threshold=1) as app:
        upstream.script(Status(500))
        token = app.token()
        generate(app, token)
        refused = generate(app, token)
        assert refused.status == 503
        request = the_one(app, refused.request_id, token)
    error = request["error"]
    assert (error["name"], error["fault"], error["retry"]) == ("CircuitOpenError", "upstream", True)
    assert error["retry_after_s"] == int(refused.headers["retry-after"])
    assert (request["outcome"], request["attempts"]) == ("error", [])


def test_a_stream_that_its_caller_leaves(app: AppUnderTest, upstream: FakeUpstream) -> None:
    upstream.script(Stream(interval_s=0.2, chunks=("a ",) * 50))
    token = app.token()
    with calling(app, token) as caller:
        caller.event()
    completed_line(app, caller.request_id)
    request = the_one(app, caller.request_id, token)
    assert (request["outcome"], request["streamed"], request["status"]) == ("cancelled", True, 200)
    assert request["error"]["name"] == "CallerLeftError"
    assert [each["error"] for each in request["attempts"]] == ["cancelled"]
    assert request["times"]["first_piece_s"] > 0


@pytest.mark.parametrize(
    ("path", "sent", "name"),
    [
        ("/nowhere", {}, "NotFoundError"),
        ("/llm/generate", {"headers": {"Content-Type": "text/plain"}}, "UnsupportedMediaTypeError"),
        ("/llm/generate", {"body": b"x" * 2_000}, "PayloadTooLargeError"),
        ("/v1/chat/completions", {}, "ValidationError"),
        ("/v1/messages", {}, "ValidationError"),
    ],
)
def test_each_refusal_is_known_to_its_caller(
    upstream: FakeUpstream, tmp_path: Path, path: str, sent: dict[str, Any], name: str
) -> None:
    with serving(upstream, tmp_path, max_body_bytes=1_000) as app:
        token = app.token()
        answer = app.call("POST", path, token=token, **{"body": {"messages": 7}, **sent})
        request = the_one(app, answer.request_id, token)
        assert request["error"]["name"] == name
        assert (request["user"], request["error"]["fault"]) == ("user", "caller")


def test_a_429_is_known_and_may_be_asked_about(upstream: FakeUpstream, tmp_path: Path) -> None:
    with serving(upstream, tmp_path, rate_limit="1/hour") as app:
        token = app.token()
        generate(app, token)
        refused = generate(app, token)
        assert refused.status == 429
        error = the_one(app, refused.request_id, token)["error"]
    assert (error["name"], error["fault"], error["retry"]) == ("RateLimitError", "caller", True)
    assert error["retry_after_s"] == int(refused.headers["retry-after"])


def test_the_id_of_another_user_looks_like_one_that_nobody_knows(app: AppUnderTest) -> None:
    admin, user = app.token("admin"), app.token()
    theirs = generate(app, admin)
    refused = app.call("POST", "/llm/generate", body={}, token=admin)

    unknown = app.call("GET", f"/requests/{UNKNOWN}", token=user)
    assert unknown.status == 404
    for identifier in (theirs.request_id, f"tr-{theirs.request_id}", refused.request_id):
        answer = app.call("GET", f"/requests/{identifier}", token=user)
        assert answer.status == 404
        told = {name: value for name, value in answer.json.items() if name in {"error", "message", "details"}}
        assert told == {name: unknown.json[name] for name in told}
    own = generate(app, user)
    assert the_one(app, own.request_id, admin)["user"] == "user", "an administrator sees all"


def test_of_a_continued_trace_each_caller_sees_their_own_calls(app: AppUnderTest) -> None:
    admin, user = app.token("admin"), app.token()
    parent = TraceParent.new("01")
    own = [
        generate(app, user, {"prompt": text}, headers={"traceparent": parent.header}) for text in ("a", "b")
    ]
    generate(app, admin, {"prompt": "c"}, headers={"traceparent": parent.header})
    app.call("POST", "/llm/generate", body={}, token=user, headers={"traceparent": parent.header})
    assert parent.trace_id is not None

    mine = explained(app, parent.trace_id, user)
    assert [request["status"] for request in mine["requests"]] == [None, None, 422]
    assert {request["user"] for request in mine["requests"]} == {"user"}
    assert len(explained(app, parent.trace_id, admin)["requests"]) == 4
    assert mine["searched"]["spool"] == "searched"
    assert mine["searched"]["mlflow"] == "failed: Connection error"
    assert mine["more"], "MLflow may know of others"
    for request in mine["requests"][:2]:
        assert the_one(app, request["record_id"], user) == request
        assert request["record_id"] != f"tr-{parent.trace_id}"
    assert own[0].status == 200


def test_what_another_process_has_left_on_disk(upstream: FakeUpstream, tmp_path: Path) -> None:
    parent = TraceParent.new("01")
    with serving(upstream, tmp_path, retry_max=1) as app:
        upstream.script(Status(503), Answer())
        plain = generate(app, app.token()).request_id
        generate(app, app.token(), headers={"traceparent": parent.header})
        remembered = the_one(app, plain, app.token())
    with serving(upstream, tmp_path) as app:
        token = app.token()
        request = the_one_from_disk(app, plain, token)
        assert request == {**remembered, "known_from": "spool"}
        continued = the_one_from_disk(app, str(parent.trace_id), token)
        assert the_one_from_disk(app, continued["record_id"], token) == continued
        assert the_one_from_disk(app, continued["incident_id"], token) == continued


def the_one_from_disk(app: AppUnderTest, identifier: str, token: str) -> Any:
    found = explained(app, identifier, token)
    (request,) = found["requests"]
    assert request["known_from"] == "spool"
    return request


def test_without_mlflow_a_404_is_final_and_with_a_failing_one_it_says_so(
    upstream: FakeUpstream, tmp_path: Path, app: AppUnderTest
) -> None:
    failing = app.call("GET", f"/requests/{UNKNOWN}", token=app.token())
    assert "mlflow (failed: Connection error)" in failing.json["message"]
    with running_app(litellm_url=upstream.url, spool_path=str(tmp_path / "other")) as without:
        answer = without.call("GET", f"/requests/{UNKNOWN}", token=without.token())
    assert answer.status == 404
    assert "could be searched" not in answer.json["message"]


@pytest.mark.parametrize(
    "identifier",
    [
        "x",
        UNKNOWN[1:],
        UNKNOWN.upper(),
        f"inc_{UNKNOWN}",
        f"tr-{UNKNOWN[:16]}",
        f"{UNKNOWN}%0a",
        "%3Cscript%3E",
    ],
)
def test_what_is_no_id_is_refused_without_being_repeated(app: AppUnderTest, identifier: str) -> None:
    answer = app.call("GET", f"/requests/{identifier}", token=app.token())
    assert answer.status == 422
    assert answer.json["details"][0]["field"] == "path.request_id"
    assert UNKNOWN[1:] not in answer.json["message"]
    page = app.call("GET", f"/requests/{identifier}", token=app.token(), headers=PAGE)
    assert page.status == 422
    assert b"<script" not in page.body


def test_unknown_query_parameters_and_strangers_are_refused(app: AppUnderTest) -> None:
    assert app.call("GET", f"/requests/{UNKNOWN}?user=admin", token=app.token()).status == 422
    answer = app.call("GET", f"/requests/{UNKNOWN}")
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json["error"] == "AuthenticationError"


def test_only_an_administrator_sees_what_a_stranger_did(app: AppUnderTest) -> None:
    answer = app.call("GET", "/auth/me", token="llmops_no")  # noqa: S106 - not one
    assert answer.status == 401
    assert app.call("GET", f"/requests/{answer.request_id}", token=app.token()).status == 404
    request = the_one(app, answer.request_id, app.token("admin"))
    assert (request["user"], request["error"]["name"]) == (None, "AuthenticationError")


class Elements(HTMLParser):
    """The elements of a page with their attributes, its style sheet, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.style = ""
        self.text = ""
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open == "style":
            self.style += data
        else:
            self.text += data

    def handle_endtag(self, _tag: str) -> None:
        self._open = ""


def elements(answer: Reply) -> Elements:
    """A page, which loads nothing, runs nothing, and has a policy that permits its own style sheet alone."""
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "Accept" in answer.headers["vary"].split(", ")
    parsed = Elements()
    parsed.feed(answer.body.decode())
    assert not {"script", "img", "link", "iframe", "form", "object"} & {tag for tag, _ in parsed.found}
    for _, given in parsed.found:
        assert not [name for name in given if name.startswith("on") or name in {"style", "src"}]
        assert re.match(r"https?://|$", given.get("href") or "")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    digest = base64.b64encode(hashlib.sha256(parsed.style.encode()).digest()).decode()
    assert policy == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return parsed


def test_the_page_draws_each_attempt_and_each_wait(upstream: FakeUpstream, tmp_path: Path) -> None:
    with serving(upstream, tmp_path, retry_max=2, grafana_url="https://grafana.example.com/") as app:
        upstream.script(Status(503), Status(503), Answer())
        token = app.token()
        answer = generate(app, token)
        page = elements(app.call("GET", f"/requests/{answer.request_id}", token=token, headers=PAGE))
    bars = [given["fill"] for tag, given in page.found if tag == "rect"]
    assert len(bars) == 1 + 3 + 2, "the call, three attempts, two waits"
    for text in ("The model answered after 2 retries", "Attempt 3", "UpstreamError 503", answer.request_id):
        assert text in page.text
    links = [str(given["href"]) for tag, given in page.found if tag == "a"]
    assert [link.startswith("https://grafana.example.com/explore?") for link in links] == [True, True]
    assert all(answer.request_id in link for link in links)


def test_hostile_names_stay_text(upstream: FakeUpstream, tmp_path: Path) -> None:
    hostile = "</title><script>alert(1)</script>\"'&<b x=y>"
    with serving(upstream, tmp_path) as app:
        token = app.token()
        body = {"model": hostile, "messages": [{"role": "user", "content": "a prompt"}]}
        answer = app.call("POST", "/v1/chat/completions", body=body, token=token)
        page = elements(app.call("GET", f"/requests/{answer.request_id}", token=token, headers=PAGE))
        assert the_one(app, answer.request_id, token)["model"] == hostile
    assert hostile in page.text


def test_a_browser_without_credentials_is_told_how_to_open_the_page(app: AppUnderTest) -> None:
    answer = app.call("GET", f"/requests/{UNKNOWN}", headers=PAGE)
    assert answer.status == 401
    page = elements(answer)
    assert f"python -m service explain {UNKNOWN} --url URL --html" in page.text
    unknown = app.call("GET", f"/requests/{UNKNOWN}", token=app.token(), headers=PAGE)
    assert unknown.status == 404
    assert "404 NotFoundError" in elements(unknown).text


@pytest.mark.parametrize("capture", ["NO_CONTENT", "SPAN_ONLY"])
def test_no_prompt_and_no_answer_is_kept_or_shown(
    upstream: FakeUpstream, tmp_path: Path, capture: str
) -> None:
    given = {"otel_instrumentation_genai_capture_message_content": capture}
    with serving(upstream, tmp_path, **given) as app:
        upstream.script(Answer(content="canary answer"))
        token = app.token()
        answer = generate(app, token, {"prompt": "canary prompt", "system_prompt": "canary system"})
        asked = [
            app.call("GET", f"/requests/{answer.request_id}", token=token, headers=fields)
            for fields in ({}, PAGE)
        ]
    for shown in asked:
        assert shown.status == 200
        assert b"canary" not in shown.body
    with serving(upstream, tmp_path, **given) as app:
        from_disk = app.call("GET", f"/requests/{answer.request_id}", token=app.token())
    assert from_disk.json["requests"][0]["known_from"] == "spool"
    assert b"canary" not in from_disk.body


def test_a_slow_mlflow_is_given_up_and_does_not_hold_others_up(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    with FakeMlflow() as mlflow:
        mlflow.hang = True
        settings: dict[str, Any] = {"mlflow_tracking_uri": mlflow.url, "mlflow_timeout_s": 1}
        with running_app(litellm_url=upstream.url, spool_path=str(tmp_path), **settings) as app:
            token = app.token()
            answer = app.call("GET", f"/requests/{UNKNOWN}", token=token)
            assert answer.status == 404
            assert "mlflow (failed: Timeout)" in answer.json["message"]
            own = generate(app, token)
            assert the_one(app, own.request_id, token)["outcome"] == "success"


def test_searches_at_the_same_time_are_bounded(upstream: FakeUpstream, tmp_path: Path) -> None:
    with FakeMlflow() as mlflow:
        mlflow.hang = True
        settings: dict[str, Any] = {"mlflow_tracking_uri": mlflow.url, "mlflow_timeout_s": 3}
        with running_app(litellm_url=upstream.url, spool_path=str(tmp_path), **settings) as app:
            token = app.token()
            refused = app.call("POST", "/llm/generate", body={}, token=token)

            def ask(_number: int) -> int:
                return app.call("GET", f"/requests/{UNKNOWN}", token=token).status

            with ThreadPoolExecutor(5) as pool:
                assert sorted(pool.map(ask, range(5))) == [404, 404, 503, 503, 503]
            # What is in memory needs no search.
            assert the_one(app, refused.request_id, token)["status"] == 422
