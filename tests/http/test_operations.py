"""Every operation has the same guarantees: the tests run over the table of operations."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from service.upstream.operations import OPERATIONS
from tests.fakes.operations import MESSAGE, MESSAGE_STREAM, RESPONSE, RESPONSE_STREAM, SAMPLES, Sample, named
from tests.fakes.streams import RawStream
from tests.fakes.upstream import FakeUpstream, Reset, Silent, Status
from tests.harness import Answer, AppUnderTest
from tests.http.support import attributes, eventually, module_app, server_span, trace_of

PASSED_ON = [
    name for name, row in OPERATIONS.items() if name not in {"chat", "embeddings"} and not row.stored
]
STREAMED = [name for name in PASSED_ON if SAMPLES[name].stream is not None]
LIMITS: dict[str, Any] = {
    "llm_timeout_s": 1.5,
    "retry_max": 1,
    "retry_base_delay_s": 0.01,
    "breaker_failure_threshold": 1_000,
    "retry_budget_floor": 10_000,
    "stream_chunk_timeout_s": 0.5,
    "stream_keep_alive_s": 0.3,
    "max_v1_body_bytes": 100_000,
    "max_upload_bytes": 200_000,
    "pass_litellm_fields": ("conversation",),
}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def app(fake: FakeUpstream) -> Iterator[AppUnderTest]:
    with module_app(litellm_url=fake.url, cache_enabled=True, qdrant_path=":memory:", **LIMITS) as served:
        yield served


@pytest.fixture(autouse=True)
def _nothing_is_left(fake: FakeUpstream) -> Iterator[None]:
    yield
    fake.clear()


def test_each_operation_has_a_sample() -> None:
    assert set(PASSED_ON) == set(SAMPLES)
    assert {name: OPERATIONS[name].path for name in PASSED_ON} == {
        name: sample.path for name, sample in SAMPLES.items()
    }
    # Of bytes, the upstream decides whether they come as a stream of events.
    json_answers = [name for name in PASSED_ON if OPERATIONS[name].answer_body == "json"]
    assert {name for name in json_answers if OPERATIONS[name].read_event} == set(STREAMED)


def _ask(app: AppUnderTest, sample: Sample, **fields: Any) -> Answer:
    token = fields.pop("token", None) or app.token()
    content, content_type = sample.encoded(**fields)
    headers = {"Content-Type": content_type}
    return app.call("POST", f"/v1{sample.path}", body=content, token=token, headers=headers)


def _error(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = answer.json["error"]
    return found


def _name(error: dict[str, Any]) -> str:
    """The error's name in this service; Anthropic's protocol has a type of its own."""
    return str(error.get("name", error["type"]))


@pytest.mark.parametrize("name", PASSED_ON)
def test_bytes_pass_through(app: AppUnderTest, fake: FakeUpstream, name: str) -> None:
    sample = SAMPLES[name]
    content, content_type = sample.encoded(unknown="é")
    headers = {"Content-Type": content_type}
    answer = app.call("POST", f"/v1{sample.path}", body=content, token=app.token(), headers=headers)
    assert (answer.status, answer.body) == (200, sample.content)
    assert answer.headers["content-type"] == sample.media
    (sent,) = [seen for seen in fake.requests if seen.method == "POST"]
    assert (sent.path, sent.body) == (f"/v1{sample.path}", content)
    assert (sent.headers["content-type"], sent.headers["content-length"]) == (content_type, str(len(content)))


@pytest.mark.parametrize("name", STREAMED)
def test_streams_pass_byte_for_byte(app: AppUnderTest, fake: FakeUpstream, name: str) -> None:
    sample = SAMPLES[name]
    shows_usage = {"stream_options": {"include_usage": True}} if name == "completions" else {}
    answer = _ask(app, sample, stream=True, **shows_usage)
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
    assert answer.body == b"".join(sample.stream or ())
    (sent,) = [seen for seen in fake.requests if seen.method == "POST"]
    assert "stream_options" not in sent.json or name == "completions"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", PASSED_ON)
def test_ids_facts_and_telemetry_are_those_of_any_call(
    app: AppUnderTest, name: str, *, streamed: bool
) -> None:
    sample = SAMPLES[name]
    if streamed and sample.stream is None:
        return
    answer = _ask(app, sample, **({"stream": True} if streamed else {}))
    assert answer.headers["x-request-id"] == answer.request_id
    assert (answer.headers["x-llm-attempts"], answer.headers["x-cache"]) == ("1", "BYPASS")
    assert "total" in answer.headers["server-timing"]
    assert answer.headers.get("request-id", "") == (answer.request_id if "/messages" in sample.path else "")

    spans = {span.name: span for span in trace_of(app, answer.request_id)}
    server = server_span(app, answer.request_id)
    assert attributes(server)["http.route"] == f"/v1{sample.path}"
    attempt = attributes(spans[f"{sample.genai} demo"])
    assert attempt["gen_ai.operation.name"] == sample.genai
    assert attempt["gen_ai.request.model"] == "demo"
    assert "llm call" in spans
    if sample.counts:
        counted = (attempt["gen_ai.usage.input_tokens"], attempt["gen_ai.usage.output_tokens"])
        assert counted == sample.counts
    if sample.reasons:
        assert attempt["gen_ai.response.finish_reasons"] == sample.reasons
        assert attempt["gen_ai.response.model"] == "demo-1"
    (line,) = [one for one in app.lines(answer.request_id) if one["message"] == "llm_request_completed"]
    assert line["model"] == "demo"
    if sample.counts:
        assert (line["prompt_tokens"], line["completion_tokens"]) == sample.counts


def test_the_tokens_of_caches_and_of_reasoning_stand_on_the_span(app: AppUnderTest) -> None:
    token = app.token()
    for name, wanted in (
        (
            "responses",
            {"gen_ai.usage.cache_read.input_tokens": 4, "gen_ai.usage.reasoning.output_tokens": 5},
        ),
        (
            "messages",
            {"gen_ai.usage.cache_read.input_tokens": 4, "gen_ai.usage.cache_write.input_tokens": 2},
        ),
    ):
        for streamed in (False, True):
            answer = _ask(app, SAMPLES[name], token=token, **({"stream": True} if streamed else {}))
            (chat,) = [span for span in trace_of(app, answer.request_id) if span.name == "chat demo"]
            assert wanted.items() <= dict(attributes(chat)).items(), (name, streamed)


def test_what_was_asked_for_stands_on_the_span(app: AppUnderTest) -> None:
    previous = _ask(app, SAMPLES["responses"]).json["id"]
    answer = _ask(
        app,
        SAMPLES["responses"],
        temperature=1,
        top_p=0.5,
        max_output_tokens=50,
        reasoning={"effort": "low"},
        previous_response_id=previous,
        conversation={"id": "conv_1"},
    )
    (chat,) = [span for span in trace_of(app, answer.request_id) if span.name == "chat demo"]
    wanted = {
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.max_tokens": 50,
        "gen_ai.conversation.id": "conv_1",
    }
    assert wanted.items() <= dict(attributes(chat)).items()


FAULTS = [
    pytest.param((Status(500), 502, "UpstreamError", 2), id="500"),
    pytest.param((Reset(), 502, "UpstreamError", 2), id="reset"),
    pytest.param((Status(429), 429, "RateLimitError", 2), id="429"),
    pytest.param((Status(401), 502, "UpstreamError", 1), id="401"),
    pytest.param((Status(400, {"error": {"message": "no"}}), 400, "BadRequestError", 1), id="400"),
    pytest.param((Status(200, b"oops"), 502, "UpstreamError", 1), id="garbage"),
    pytest.param((Status(200, b"{}"), 502, "UpstreamError", 1), id="no answer"),
    pytest.param((Status(200, {"error": {"message": "x", "code": 429}}), 429, "RateLimitError", 2), id="200"),
    pytest.param((Silent(), 504, "UpstreamTimeoutError", 1), id="silence"),
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", PASSED_ON)
@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_the_same_for_all(
    app: AppUnderTest, fake: FakeUpstream, name: str, case: tuple[Any, int, str, int], *, streamed: bool
) -> None:
    fault, status, error, attempts = case
    if streamed and fault == Status(200, b"oops"):
        attempts = 2  # no event at all: the stream was cut off, which may be so once only
    sample = SAMPLES[name]
    if streamed and sample.stream is None:
        return
    fake.script(*[fault] * attempts)
    answer = _ask(app, sample, **({"stream": True} if streamed else {}))
    assert (answer.status, _name(_error(answer))) == (status, error)
    assert answer.headers["x-llm-attempts"] == str(attempts)
    assert _error(answer)["request_id"] == answer.request_id
    (call,) = [span for span in trace_of(app, answer.request_id) if span.name == "llm call"]
    for span in (server_span(app, answer.request_id), call):
        assert attributes(span)["error.type"] == error


@pytest.mark.parametrize("name", PASSED_ON)
def test_a_callers_mistake_is_said(app: AppUnderTest, name: str) -> None:
    sample, token = SAMPLES[name], app.token()
    content, content_type = sample.encoded()
    wrong: list[dict[str, Any]] = [{"api_base": "x"}, {"model": "a,b"}]
    if sample.file is None:
        wrong += [{"stream": 1}, *({field: None} for field in sample.required)]
        answer = app.call("POST", f"/v1{sample.path}", body=[1], token=token)
        assert (answer.status, _name(_error(answer))) == (422, "ValidationError")
    for fields in wrong:
        answer = _ask(app, sample, token=token, **fields)
        assert (answer.status, _name(_error(answer))) == (422, "ValidationError"), fields
    headers = {"Content-Type": content_type}
    answer = app.call("POST", f"/v1{sample.path}", body=content, headers=headers)
    assert (answer.status, _name(_error(answer))) == (401, "AuthenticationError")
    answer = _ask(app, sample, token=token, x="x" * 200_000)
    assert (answer.status, _name(_error(answer))) == (413, "PayloadTooLargeError")


@pytest.mark.parametrize("name", ["responses", "messages"])
def test_metadata_of_the_protocol_is_texts(app: AppUnderTest, name: str) -> None:
    sample, token = SAMPLES[name], app.token()
    assert _ask(app, sample, token=token, metadata={"user_id": "u"}).status == 200
    for metadata in ({"tags": ["x"]}, {"a": {"b": 1}}, "x", ["x"]):
        assert _ask(app, sample, token=token, metadata=metadata).status == 422


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize(
    ("cut", "error"),
    [
        (RawStream([], then="cut"), "UpstreamError"),
        (RawStream([], then="end"), "UpstreamError"),
        (RawStream([], then="silence"), "UpstreamTimeoutError"),
    ],
)
def test_a_stream_that_breaks_off_ends_with_an_error_event(
    app: AppUnderTest, fake: FakeUpstream, name: str, cut: RawStream, error: str
) -> None:
    sample = SAMPLES[name]
    begun = list(sample.stream or ())[:2]
    fake.script(RawStream([*begun, b": end\n\n"], then=cut.then))
    answer = _ask(app, sample, stream=True)
    assert answer.status == 200
    assert answer.body.startswith(b"".join(begun))
    last = answer.body.split(b"\n\n")[-2]
    event, _, content = last.rpartition(b"data: ")
    said = json.loads(content)
    assert _name(said["error"]) == error
    if name != "completions":
        assert event == b"event: error\n"
        assert said["type"] == "error"
    if name == "responses":
        assert said["sequence_number"] == 2
    (line,) = [one for one in app.lines(answer.request_id) if one["message"] == "llm_request_failed"]
    assert line["error"] == error


def test_a_response_that_failed_is_told_by_its_own_event_and_counts_as_failed(
    app: AppUnderTest, fake: FakeUpstream
) -> None:
    failed = {**RESPONSE, "status": "failed", "error": {"code": "server_error", "message": "x"}, "output": []}
    events = [*RESPONSE_STREAM[:2], named("response.failed", response=failed, sequence_number=2)]
    fake.script(RawStream(events))
    answer = _ask(app, SAMPLES["responses"], stream=True)
    assert answer.body == b"".join(events)
    eventually(
        lambda: [one for one in app.lines(answer.request_id) if one["message"] == "llm_request_failed"],
        "the call to fail",
    )
    assert attributes(server_span(app, answer.request_id))["error.type"] == "UpstreamError"


def test_a_response_cut_short_is_an_answer(app: AppUnderTest, fake: FakeUpstream) -> None:
    short = {**RESPONSE, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    fake.script(
        RawStream([*RESPONSE_STREAM[:2], named("response.incomplete", response=short, sequence_number=2)])
    )
    answer = _ask(app, SAMPLES["responses"], stream=True)
    (chat,) = [span for span in trace_of(app, answer.request_id) if span.name == "chat demo"]
    assert attributes(chat)["gen_ai.response.finish_reasons"] == ("max_output_tokens",)
    assert "error.type" not in attributes(chat)


def test_a_whole_message_is_handed_on_as_a_stream(app: AppUnderTest, fake: FakeUpstream) -> None:
    fake.script(Status(200, json.dumps(MESSAGE)))
    answer = _ask(app, SAMPLES["messages"], stream=True)
    events = [json.loads(event.rpartition(b"data: ")[2]) for event in answer.body.split(b"\n\n")[:-1]]
    assert [event["type"] for event in events] == [
        "message_start",
        *("content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert [next(value for key, value in delta.items() if key != "type") for delta in deltas] == [
        *("Hm.", "c2ln", "Ein Pfad 🙂", '{"at":"it"}'),
    ]


WHOLE = {
    **RESPONSE,
    "output": [
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [
                {"type": "output_text", "text": "Ein Pfad", "annotations": []},
                {"type": "refusal", "refusal": "No."},
            ],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "look", "arguments": '{"a":1}'},
    ],
}


@pytest.mark.parametrize("end", ["completed", "incomplete", "failed"])
def test_a_whole_response_is_handed_on_as_a_stream(app: AppUnderTest, fake: FakeUpstream, end: str) -> None:
    error = {"code": "server_error", "message": "x"} if end == "failed" else None
    whole = json.dumps({**WHOLE, "status": end, "error": error})
    fake.script(Status(200, whole))
    url = f"http://127.0.0.1:{app.port}/v1"
    with openai.OpenAI(base_url=url, api_key=app.token(), max_retries=0) as client:
        events = list(client.responses.create(model="demo", input="x", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    seen = [event.type for event in events]
    assert events[-1].to_dict()["response"] == json.loads(whole)
    assert seen == [
        *("response.created", "response.in_progress"),
        *("response.output_item.added", "response.output_item.done"),
        *("response.output_item.added", "response.content_part.added", "response.output_text.delta"),
        *("response.output_text.done", "response.content_part.done"),
        *("response.content_part.added", "response.refusal.delta", "response.refusal.done"),
        *("response.content_part.done", "response.output_item.done"),
        *("response.output_item.added", "response.function_call_arguments.delta"),
        *("response.function_call_arguments.done", "response.output_item.done"),
        f"response.{end}",
    ]


def test_errors_of_messages_have_anthropics_shape(app: AppUnderTest) -> None:
    answer = app.call("POST", "/v1/messages", body={"model": "demo"}, token=app.token())
    assert answer.status == 422
    assert answer.json["type"] == "error"
    assert answer.json["request_id"] == answer.request_id
    error = _error(answer)
    assert (error["type"], error["name"]) == ("invalid_request_error", "ValidationError")
    unknown = app.call("POST", "/v1/messages", body=SAMPLES["messages"].request)
    assert (_error(unknown)["type"], unknown.status) == ("authentication_error", 401)


@pytest.mark.parametrize("field", ["x-api-key", "api-key", "Authorization"])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions", "/auth/me"])
def test_a_token_may_come_in_any_clients_field(app: AppUnderTest, field: str, path: str) -> None:
    token = app.token()
    value = f"Bearer {token}" if field == "Authorization" else token
    if path == "/auth/me":
        answer = app.call("GET", path, headers={field: value})
    else:
        sample = SAMPLES["messages"].request
        answer = app.call("POST", path, body=sample, headers={field: value})
    assert answer.status == 200
    assert app.call("GET", "/auth/me", headers={field: value[:-2]}).status == 401


def test_anthropics_header_fields_are_passed_on(app: AppUnderTest, fake: FakeUpstream) -> None:
    fields = {"anthropic-version": "2023-06-01", "anthropic-beta": "x-1", "x-other": "y"}
    app.call("POST", "/v1/messages", body=SAMPLES["messages"].request, token=app.token(), headers=fields)
    (sent,) = [seen for seen in fake.requests if seen.method == "POST"]
    headers = {name.lower(): value for name, value in sent.headers.items()}
    assert (headers["anthropic-version"], headers["anthropic-beta"]) == ("2023-06-01", "x-1")
    assert "x-other" not in headers
    assert "x-api-key" not in headers


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/v1/chat/completions/",
            "//v1/chat/completions",
            "/v1//chat/completions",
            "/v1/v1/chat/completions",
        ),
        *("/openai/deployments/demo/chat/completions?api-version=2025-01-01", "/openai/v1/chat/completions"),
        "/openai/chat/completions?api-version=2025-01-01",  # as Azure's client asks for /responses
    ],
)
def test_paths_that_clients_make_of_a_base_url_lead_to_the_route(
    app: AppUnderTest, fake: FakeUpstream, path: str
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    answer = app.call("POST", path, body=body, token=app.token())
    assert answer.status == 200
    assert attributes(server_span(app, answer.request_id))["http.route"] == "/v1/chat/completions"
    (sent,) = fake.chat_requests
    assert (sent.path, sent.json["model"]) == ("/v1/chat/completions", "demo")


def test_azures_deployment_is_the_model(app: AppUnderTest, fake: FakeUpstream) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    path = "/openai/deployments/other-model/chat/completions?api-version=2025-01-01"
    assert app.call("POST", path, body=body, headers={"api-key": app.token()}).status == 200
    assert fake.chat_requests[0].json["model"] == "other-model"


def test_azures_deployment_goes_before_the_bodys_model(app: AppUnderTest, fake: FakeUpstream) -> None:
    body = {"model": "gpt-5.4", "messages": [{"role": "user", "content": "x"}]}
    path = "/openai/deployments/demo/chat/completions?api-version=2025-01-01"
    assert app.call("POST", path, body=body, headers={"api-key": app.token()}).status == 200
    assert fake.chat_requests[0].json == {**body, "model": "demo"}
    # As REST calls of Azure have it, also where a body must name its model.
    for below, fields in (("embeddings", {"input": "x"}), ("images/generations", {"prompt": "x"})):
        path = f"/openai/deployments/demo/{below}?api-version=2025-01-01"
        assert app.call("POST", path, body=fields, headers={"api-key": app.token()}).status == 200


@pytest.mark.parametrize(
    "deployment", ["m1%2Cm2", "a%00b", "a%0D%0Ab", "%20demo", "d%C3%A9mo", "x" * 201], ids=repr
)
@pytest.mark.parametrize("below", ["chat/completions", "responses", "audio/transcriptions"])
def test_a_deployment_is_the_name_of_one_model(
    app: AppUnderTest, fake: FakeUpstream, deployment: str, below: str
) -> None:
    answer = app.call("POST", f"/openai/deployments/{deployment}/{below}", body={}, token=app.token())
    assert answer.status == 404
    assert [seen for seen in fake.requests if seen.method == "POST"] == []


@pytest.mark.parametrize("name", ["completions", "images"])
@pytest.mark.parametrize(
    "wrong", [{"n": 10**9}, {"n": 0}, {"n": "2"}, {"n": True}, {"best_of": 129}], ids=str
)
def test_the_number_of_answers_is_bounded(app: AppUnderTest, name: str, wrong: dict[str, Any]) -> None:
    answer = _ask(app, SAMPLES[name], **wrong)
    assert (answer.status, answer.json["error"]["param"]) == (422, next(iter(wrong)))
    assert _ask(app, SAMPLES[name], n=2).status == 200


def test_half_a_surrogate_pair_does_not_cost_a_span_its_attribute(app: AppUnderTest) -> None:
    asked = {**SAMPLES["messages"].request, "stop_sequences": ["\ud800", "x"], "reasoning_effort": "\ud801"}
    found = app.call("POST", "/v1/messages", body=asked, token=app.token())
    (attempt,) = [span for span in trace_of(app, found.request_id) if span.name == "chat demo"]
    assert attributes(attempt)["gen_ai.request.stop_sequences"] == ("?", "x")


def test_whole_images_are_handed_on_as_a_stream(app: AppUnderTest, fake: FakeUpstream) -> None:
    usage = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
    whole = {"created": 7, "data": [{"b64_json": "AA=="}, {"b64_json": "AAA="}], "usage": usage}
    fake.script(Status(200, whole))
    found = _ask(app, SAMPLES["images"], stream=True)
    kind = "image_generation.completed"
    assert [json.loads(event.rpartition(b"data: ")[2]) for event in found.body.split(b"\n\n")[:-1]] == [
        {"type": kind, "created_at": 7, "b64_json": "AA=="},
        {"type": kind, "created_at": 7, "b64_json": "AAA=", "usage": usage},
    ]


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1", "/v1/assistants", "/v1/messages/batches"])
def test_a_path_that_is_not_there_names_those_that_are(app: AppUnderTest, path: str) -> None:
    answer = app.call("POST", path, body={}, token=app.token())
    assert (answer.status, _name(_error(answer))) == (404, "NotFoundError")
    for operation in OPERATIONS.values():
        assert f"/v1{operation.path}" in _error(answer)["message"]


def test_openais_library_reads_responses(app: AppUnderTest) -> None:
    url = f"http://127.0.0.1:{app.port}/v1"
    with openai.OpenAI(base_url=url, api_key=app.token(), max_retries=0) as client:
        response = client.responses.create(model="demo", input="x")
        assert response.output_text == "Ein Pfad 🙂"
        with client.responses.stream(model="demo", input="x") as stream:
            kinds = [event.type for event in stream]
            assert kinds[-1] == "response.completed"
        assert client.completions.create(model="demo", prompt="x").choices[0].text == " a path"
        assert not client.moderations.create(model="demo", input="x").results[0].flagged


def test_the_events_of_a_message_are_those_of_the_provider() -> None:
    # What the sample has to be, so that the test of its bytes says something.
    assert [event.partition(b"\n")[0] for event in MESSAGE_STREAM][2] == b"event: ping"
