"""Whose record it is: nobody writes to another caller's record, or decides what is recorded."""

import re
import secrets
import time
from collections import Counter
from typing import Any

from tests.fakes.mlflow import Kept
from tests.faults.attack.rows import Finding, Rows
from tests.faults.attack.target import Target, wait_for
from tests.faults.attack.wire import head

RECORDS: Rows[Target] = Rows()
INVENTED = 250
MAX_MODELS = 202
"""Names of models on a metric: 200, the default one and ``other``."""


def records_of(target: Target, trace_id: str, number: int) -> list[Kept]:
    """The records of a trace, once so many are there."""
    found: list[Kept] = []

    def arrived() -> bool:
        found[:] = [kept for kept in target.mlflow.kept if kept.request_id == trace_id]
        return len(found) >= number

    wait_for(arrived, 15)
    return found


def traced() -> tuple[str, dict[str, str]]:
    """A trace id and the header that continues it."""
    trace_id = secrets.token_hex(16)
    return trace_id, {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}


@RECORDS.row(
    "a traceparent that was used before",
    "an administrator's call, then a user's that fails and one that does not, with the same traceparent",
    "three records, each with its own id, user and outcome",
)
def _(target: Target, found: Finding) -> None:
    trace_id, header = traced()
    prompt: dict[str, Any] = {"prompt": secrets.token_hex(8)}
    target.call("POST", "/llm/generate", body=prompt, headers=header, token=target.admin)
    target.call("POST", "/llm/generate", body={**prompt, "model": "refusing"}, headers=header)
    target.call("POST", "/llm/generate", body=prompt, headers=header)
    kept = records_of(target, trace_id, 3)
    users = sorted(f"{one.span.attributes['user.id']} {one.span.status}" for one in kept)
    ids = {one.span.trace_id for one in kept}
    found.say(f"{users}, {len(ids)} ids")
    found.expect(users == ["admin OK", "user ERROR", "user OK"], f"the records: {users}")
    found.expect(len(ids) == 3 and trace_id not in ids, "two calls write to one record")
    tags = {
        (one.span.attributes["mlflow.traceTag.request_id"], one.span.attributes["mlflow.traceTag.span_id"])
        for one in kept
    }
    found.expect(len(tags) == 3, f"the tags do not tell them apart: {tags}")


@RECORDS.row(
    "incident_id in the log",
    "requests that fail: 401, 404, 422, 400, 502, and bytes that are no request",
    "on every log line of theirs, equal to the one in the answer",
)
def _(target: Target, found: Finding) -> None:
    answers = [
        target.call("GET", "/auth/me", token=None),
        target.call("GET", "/nothing"),
        target.call("POST", "/llm/generate", body={}),
        target.call("POST", "/llm/generate", body={"prompt": secrets.token_hex(8), "model": "refusing"}),
        target.call("POST", "/llm/generate", body={"prompt": "h", "model": "broken"}, token=target.admin),
    ]
    incidents = {answer.request_id: answer.json["incident_id"] for answer in answers}
    seen = target.talk(b"GET /x HTTP/3.3\r\n\r\n")
    for malformed in seen.answers:
        said = re.search(rb'"incident_id":"(inc_[0-9a-f]{16})"', malformed.body)
        incidents[malformed.request_id] = said[1].decode() if said else ""
    time.sleep(0.3)
    lines = [line for line in target.process.lines() if line.get("request_id") in incidents]
    found.say(f"{len(lines)} lines of {len(incidents)} requests")
    found.expect(len(lines) >= len(incidents), "lines are missing")
    for line in lines:
        wanted = incidents[line["request_id"]]
        found.expect(line.get("incident_id") == wanted, f"{line['message']}: {line.get('incident_id')}")


@RECORDS.row(
    "sampling by ratio",
    "eighty requests of one trace at a ratio of 0.5, forty of them with the flag off",
    "some are recorded and some are not, whatever the caller sends",
)
def _(target: Target, found: Finding) -> None:
    for flag in ("00", "01"):
        trace_id = secrets.token_hex(16)
        header = f"traceparent: 00-{trace_id}-{secrets.token_hex(8)}-{flag}"
        seen = target.talk(head("GET", "/auth/me", target.token, (header,)) * 39 + target.last(), inputs=40)
        flags = [int(answer.headers["traceresponse"].rsplit("-", 1)[1], 16) & 1 for answer in seen.answers]
        found.say(f"flag {flag}: {sum(flags)} of {len(flags)} recorded")
        # With half of them, none or all of 39 come once in 10^11 runs.
        found.expect(0 < sum(flags[:-1]) < len(flags[:-1]), "the trace id or the flag decides")


@RECORDS.row(
    "invented names of models",
    f"{INVENTED} names that the upstream does not list, then one that it lists",
    "the listed model has its own name and cost on the metrics",
)
def _(target: Target, found: Finding) -> None:
    statuses: Counter[int] = Counter()
    for number in range(INVENTED):
        body = {"prompt": f"{number}", "model": f"invented-{secrets.token_hex(2)}-{number}"}
        statuses[target.call("POST", "/llm/generate", body=body).status] += 1
    target.call("POST", "/llm/generate", body={"prompt": secrets.token_hex(8), "model": "listed"})

    def models() -> set[str]:
        return {str(point.attributes.get("model")) for point in target.receiver.latest("llmops.llm.calls")}

    wait_for(lambda: "listed" in models(), 10)
    found.say(f"{dict(statuses)}, {len(models())} names on llmops.llm.calls")
    found.expect("listed" in models(), "the listed model is 'other'")
    found.expect(len(models()) <= MAX_MODELS, "the names are not bounded")


@RECORDS.row(
    "costs and counts that cannot be",
    "answers with a cost of 1e9, -1 and nan dollars, and with 1e30 tokens; twice each",
    "null in the answer, nothing on the metric, one WARN for each number",
)
def _(target: Target, found: Finding) -> None:
    before = len(target.process.lines())
    for model, field in (
        ("costs-1e9", "cost"),
        ("costs-negative", "cost"),
        ("costs-nan", "cost"),
        ("counts-1e30", "prompt_tokens"),
    ):
        for _again in range(2):
            body = {"prompt": secrets.token_hex(8), "model": model}
            answer = target.call("POST", "/llm/generate", body=body)
            found.expect((answer.status, answer.json[field]) == (200, None), f"{model}: {answer.body!r}")
    time.sleep(0.3)
    warned = [line for line in target.process.lines()[before:] if line["level"] == "WARNING"]
    warned = [line for line in warned if str(line.get("model", "")).startswith(("costs-", "counts-"))]
    places = [(line["model"], line["place"]) for line in warned]
    found.say(f"{len(places)} warnings")
    found.expect(len({model for model, _ in places}) == 4, f"the warnings are about {places}")
    found.expect(len(places) == len(set(places)), f"said twice: {places}")
    costs = [point.value for point in target.receiver.latest("llmops.llm.cost")]
    found.expect(all(0 <= cost < 1_000 for cost in costs), f"the metric holds {costs}")
