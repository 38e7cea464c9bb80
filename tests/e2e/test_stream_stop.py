"""A stop signal in the middle of streams: they end by themselves within the limit, or are told why not."""

import signal

import pytest

from tests.e2e.support import stopped
from tests.fakes.streams import DONE, Gate, GatedStream, RawStream, chunk, text, usage
from tests.fakes.upstream import FakeUpstream
from tests.harness import ServiceProcess
from tests.http.streaming import calling, data, events, name

pytestmark = pytest.mark.e2e

WHOLE = (text("a "), text("trace"), chunk(reason="stop"), usage(), DONE)
PATHS = ("/v1/chat/completions", "/llm/generate")
GENERATE = {"prompt": "x", "stream": True}


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_within_the_limit_ends_by_itself(upstream: FakeUpstream, path: str) -> None:
    gate = Gate()
    upstream.script(GatedStream(WHOLE, gate))
    gate.allow()
    with ServiceProcess({"LITELLM_URL": upstream.url}) as process:
        process.wait_ready()
        body = GENERATE if path == PATHS[1] else None
        with calling(process, process.token(), body, path) as caller:
            assert caller.event()
            assert process.process is not None
            process.process.send_signal(signal.SIGTERM)
            while process.call("GET", "/health/detailed").json["status"] != "draining":
                pass
            gate.allow(len(WHOLE))
            last = events(caller.rest())[-1]
        assert process.process.wait(10) == 0
        messages = [line["message"] for line in process.lines(caller.request_id)]
    assert last == DONE if path == PATHS[0] else name(last) == "done"
    assert "llm_request_completed" in messages


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_beyond_the_limit_is_told_so(upstream: FakeUpstream, path: str) -> None:
    upstream.script(RawStream((text("a "),), "silence"))
    variables = {"LITELLM_URL": upstream.url, "SHUTDOWN_TIMEOUT_S": "0.5"}
    with ServiceProcess(variables) as process:
        process.wait_ready()
        body = GENERATE if path == PATHS[1] else None
        with calling(process, process.token(), body, path) as caller:
            assert caller.event()
            lines = stopped(process)
            # Read to its end in order: the answer is not just cut off.
            (last,) = events(caller.rest())
            request_id = caller.request_id
    error = data(last)["error"]
    assert (error if path == PATHS[1] else error["type"]) == "ShuttingDownError"
    assert b"[DONE]" not in last
    assert name(last) == ("" if path == PATHS[0] else "error")
    mine = [line for line in lines if line.get("request_id") == request_id]
    ended = [line for line in mine if line["message"].startswith("llm_request_")]
    assert [line["message"] for line in ended] == ["llm_request_started", "llm_request_failed"]
    assert (ended[1]["outcome"], ended[1]["completion_tokens"]) == ("cancelled", 1)
    (completed,) = [line for line in mine if line["message"] == "http_request_completed"]
    assert completed["error"] == "ShuttingDownError"
    assert not [line for line in lines if line["level"] in {"ERROR", "CRITICAL"}]
    upstream.wait_for(lambda fake: fake.disconnects == 1)
