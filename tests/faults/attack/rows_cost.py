"""What a request may cost: processor time, paid calls, and what is passed on."""

import json
import secrets
from concurrent.futures import ThreadPoolExecutor

from service.upstream.control_fields import FIELDS, PREFIXES
from tests.faults.attack.costs import LIMIT_S, Costs
from tests.faults.attack.rows import Finding, Rows
from tests.faults.attack.target import MIB, Target
from tests.faults.attack.upstream import INPUTS, large_embeddings

COST: Rows[Target] = Rows()
LARGE_CALLS = 8
MIB_OF_JSON = 1_048_000


def filled(before: bytes, unit: bytes, after: bytes, between: bytes = b",", size: int = MIB_OF_JSON) -> bytes:
    """A body of about this size: the same value again and again."""
    number = (size - len(before) - len(after)) // (len(unit) + len(between))
    return before + between.join([unit] * number) + after


def measured(target: Target, found: Finding, path: str, body: bytes, what: str) -> None:
    """Send a body, and compare what it cost the event loop with the limit."""
    cost = Costs(target).of(path, body, what)
    found.say(f"{what}: {cost.status}, {cost.held_s * 1_000:.0f} ms")
    found.expect(cost.held_s < LIMIT_S, f"{what} keeps the loop for {cost.held_s * 1_000:.0f} ms")


@COST.row(
    "a sign-in of 128,000 unknown keys",
    "no token: 1.3 MB, then 8 kB of them",
    "413, then 422; under 50 ms of processor time",
)
def _(target: Target, found: Finding) -> None:
    keys = b",".join(b'"%x":1' % number for number in range(128_000))
    measured(target, found, "/auth/login", b"{" + keys + b"}", "1.3 MB")
    measured(target, found, "/auth/login", b"{" + keys[:8_100].rpartition(b",")[0] + b"}", "8 kB")


@COST.row(
    "a megabyte of short values",
    '"x":[[],[],...], [1,1,...], [{},{},...], ["","",...] in prompts, chats and embeddings',
    "422 or 200; under 50 ms of processor time",
)
def _(target: Target, found: Finding) -> None:
    chat = b'{"model":"demo","messages":[{"role":"user","content":"h"}],"x":['
    for unit in (b"[]", b"1", b"{}", b'""', b"[1]"):
        measured(target, found, "/v1/chat/completions", filled(chat, unit, b"]}"), f"chat {unit.decode()}")
    schema = filled(b'{"prompt":"h","response_format":{"x":[', b"1", b"]}}")
    measured(target, found, "/llm/generate", schema, "response_format 1")
    tokens = filled(b'{"model":"demo","input":[[', b"12345", b"]]}")
    measured(target, found, "/v1/embeddings", tokens, "input 12345")


@COST.row(
    "a reason of 300 characters against a prompt full of candidates",
    "an upstream's 400 against 209,000 times a letter that stands 75 times in its reason",
    "400; under 50 ms of processor time",
)
def _(target: Target, found: Finding) -> None:
    before, after = b'{"model":"refusing","messages":[{"role":"user","content":"', b'"}]}'
    for unit in ("é", "001é002é", "é001"):
        body = filled(before, unit.encode(), after, b"", 420_000)
        measured(target, found, "/v1/chat/completions", body, unit)


@COST.row(
    "embeddings of 1,947 inputs with 30 MB of answer",
    f"one call, then {LARGE_CALLS} at once while /health is asked",
    "the answers as they are; under 50 ms for one call, 400 ms for eight; no memory but the answers'",
)
def _(target: Target, found: Finding) -> None:
    content = large_embeddings()
    body = json.dumps({"model": "large", "input": ["a"] * INPUTS}).encode()
    measured(target, found, "/v1/embeddings", body, "one call")
    before = target.gauges.peak_bytes()
    costs = Costs(target)
    with ThreadPoolExecutor(LARGE_CALLS) as pool:
        calls = [
            pool.submit(target.call, "POST", "/v1/embeddings", body=body, timeout_s=60)
            for _ in range(LARGE_CALLS)
        ]
        held_s = costs.held_while(lambda: not all(call.done() for call in calls))
        same = [call.result().body == content for call in calls]
    grown = target.gauges.peak_bytes() - before
    found.say(f"{LARGE_CALLS} calls: {held_s * 1_000:.0f} ms, peak +{grown / MIB:.0f} MiB")
    found.expect(all(same), "an answer is not the upstream's")
    # Another request may wait for one turn of each call; a turn has the limit of a call.
    found.expect(held_s < LARGE_CALLS * LIMIT_S, f"the loop is kept for {held_s * 1_000:.0f} ms")
    found.expect(grown < 2 * LARGE_CALLS * len(content), "the memory is not bounded by the answers")


@COST.row(
    "a list of models in a name",
    '"model": "gpt,gpt,... x 50", "demo,demo", "demo\\n", a list, a number; in all three protocols',
    "422, and the upstream is not asked",
)
def _(target: Target, found: Finding) -> None:
    mark = secrets.token_hex(8)
    for model in (",".join(["gpt"] * 50), "demo,demo", ",demo", "demo\n", ["demo"], 5):
        for path, rest in (
            ("/llm/generate", {"prompt": mark}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": mark}]}),
            ("/v1/embeddings", {"input": mark}),
        ):
            answer = target.call("POST", path, body={"model": model, **rest})
            found.expect(answer.status == 422, f"{path} {model!r}: {answer.status}")
    asked = [request for request in target.upstream.requests if mark.encode() in request.body]
    found.say(f"18 requests, {len(asked)} calls of the upstream")
    found.expect(not asked, "the upstream was asked")


@COST.row(
    "LiteLLM's control fields",
    "each field of its own, and one for each prefix, on /v1/chat/completions and /v1/embeddings",
    "422 that names the field, and the upstream is not asked",
)
def _(target: Target, found: Finding) -> None:
    mark = secrets.token_hex(8)
    names = sorted(FIELDS | {f"{prefix}x" for prefix in PREFIXES} | {"input_cost_per_token"})
    for name in names:
        for path, rest in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": mark}]}),
            ("/v1/embeddings", {"input": mark}),
        ):
            answer = target.call("POST", path, body={"model": "demo", **rest, name: 8})
            refused = answer.status == 422 and answer.json["error"]["param"] == name
            found.expect(refused, f"{path} {name}: {answer.status}")
    asked = [request for request in target.upstream.requests if mark.encode() in request.body]
    found.say(f"{len(names)} fields, {len(asked)} calls of the upstream")
    found.expect(not asked, "the upstream was asked")


@COST.row(
    "baggage and tracestate",
    "7.7 kB of baggage and 8 kB of tracestate on a call of each kind",
    "the upstream gets traceparent only, of the same trace",
)
def _(target: Target, found: Finding) -> None:
    mark = secrets.token_hex(8)
    trace_id = secrets.token_hex(16)
    headers = {
        "baggage": ",".join(f"{mark}{number}=v" for number in range(350)),
        "tracestate": ",".join(f"t{number}={'v' * 250}" for number in range(31)),
        "traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01",
    }
    # Another prompt, which is not in the cache already.
    chat = {"model": "demo", "messages": [{"role": "user", "content": f"chat {mark}"}]}
    target.call("POST", "/llm/generate", body={"prompt": mark}, headers=headers)
    target.call("POST", "/v1/chat/completions", body={**chat, "stream": True}, headers=headers)
    target.call("POST", "/v1/embeddings", body={"model": "demo", "input": mark}, headers=headers)
    asked = [request for request in target.upstream.requests if mark.encode() in request.body]
    passed = {name for request in asked for name in request.headers} & {"baggage", "tracestate"}
    found.say(f"{len(asked)} calls of the upstream")
    found.expect(len(asked) == 3, "a call is missing")
    found.expect(not passed, f"passed on: {passed}")
    found.expect(all(trace_id in request.headers["traceparent"] for request in asked), "another trace")
    found.expect(all(mark not in json.dumps(request.headers) for request in asked), "baggage passes")
