"""Writes streams that LiteLLM does not make: ``python -m tests.fakes.recordings.written``.

They follow the protocols' documentation and the types of ``openai`` and ``anthropic``. Some are written in
the less usual ways that server-sent events may be written in.
"""

import json
import sys
from codecs import BOM_UTF8
from collections.abc import Iterable
from typing import Any

from tests.fakes.recordings import FOLDER, PROTOCOLS, write

Event = dict[str, Any]
UPSTREAM_FAILED = "failed-UpstreamError"


def sse(event: Event, end: str = "\n", *, name: bool = True) -> str:
    """One event, whose type is its name."""
    head = f"event: {event['type']}{end}" if name else ""
    return f"{head}data: {json.dumps(event, ensure_ascii=False)}{end}{end}"


def plain(events: Iterable[Event]) -> bytes:
    """Events as they are mostly written."""
    return "".join(map(sse, events)).encode()


def with_ends(events: Iterable[Event], end: str) -> bytes:
    """Events with other line ends."""
    return "".join(sse(event, end) for event in events).encode()


def without_names(events: Iterable[Event]) -> bytes:
    """Events without the field ``event``."""
    return "".join(sse(event, name=False) for event in events).encode()


def with_comments(events: Iterable[Event]) -> bytes:
    """Events with comments before, between and within them."""
    written = ": hello\n\n" + "\n: here\n\n".join(map(sse, events)) + ": bye\n\n"
    return written.replace("\ndata:", "\n: within\ndata:").encode()


def with_ids(events: Iterable[Event]) -> bytes:
    """Events with the fields ``id`` and ``retry``, and one of the future."""
    written = [
        f"id: {number}\nretry: 3000\nshape: round\n{sse(event)}" for number, event in enumerate(events)
    ]
    return "".join(written).encode()


def in_several_lines(events: Iterable[Event]) -> bytes:
    """Events whose data is in several lines, with and without a space behind the colon."""
    written = []
    for event in events:
        lines = json.dumps(event, indent=1, ensure_ascii=False).splitlines()
        data = "".join(f"data:{' ' if number % 2 else ''}{line}\n" for number, line in enumerate(lines))
        written.append(f"event:{event['type']}\n{data}\n")
    return "".join(written).encode()


def with_empty_lines(events: Iterable[Event]) -> bytes:
    """Events with more empty lines between them than one."""
    return "\n\n".join(map(sse, events)).encode() + b"\n\n"


def escaped(events: Iterable[Event]) -> bytes:
    """Events in ASCII: what lies beyond 16 bits is written as two halves."""
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events).encode()


# ---- Responses -----------------------------------------------------------------------------------------

USAGE = {
    "input_tokens": 11,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 22,
    "output_tokens_details": {"reasoning_tokens": 5},
    "total_tokens": 33,
}
IN_PART = {"item_id": "msg_1", "output_index": 0, "content_index": 0}


def response(status: str, *output: Event, **more: Any) -> Event:
    """A response."""
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1_795_000_000,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": "demo-1",
        "output": list(output),
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": None if status in {"in_progress", "queued", "failed"} else USAGE,
        **more,
    }


def said(text: str, *annotations: Event) -> Event:
    """A message of the output."""
    part = {"type": "output_text", "text": text, "annotations": list(annotations), "logprobs": []}
    return {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [part]}


def numbered(*events: Event) -> list[Event]:
    """Events with their numbers."""
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


BEGINS = (
    {"type": "response.created", "response": response("in_progress")},
    {"type": "response.in_progress", "response": response("in_progress")},
)
MESSAGE_BEGINS = (
    {
        "type": "response.output_item.added",
        "output_index": 0,
        "item": {**said(""), "status": "in_progress", "content": []},
    },
    {
        "type": "response.content_part.added",
        **IN_PART,
        "part": {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    },
)


def delta(text: str) -> Event:
    """A piece of text."""
    return {"type": "response.output_text.delta", **IN_PART, "delta": text, "logprobs": []}


def message(*pieces: str) -> tuple[Event, ...]:
    """The events of a message of the output."""
    text = "".join(pieces)
    return (
        *MESSAGE_BEGINS,
        *map(delta, pieces),
        {"type": "response.output_text.done", **IN_PART, "text": text, "logprobs": []},
        {
            "type": "response.content_part.done",
            **IN_PART,
            "part": {"type": "output_text", "text": text, "annotations": [], "logprobs": []},
        },
        {"type": "response.output_item.done", "output_index": 0, "item": said(text)},
    )


def ends(*output: Event, status: str = "completed", **more: Any) -> Event:
    """The last event of a response."""
    return {"type": f"response.{status}", "response": response(status, *output, **more)}


def with_item(item: Event, *events: Event) -> list[Event]:
    """A response whose output is an item, with its own events."""
    at = {"output_index": 0, "item_id": item["id"]}
    return numbered(
        *BEGINS,
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "status": "in_progress"}},
        *({**at, **event} for event in events),
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        ends(item),
    )


def call_of(kind: str, **fields: Any) -> Event:
    """A call of a tool as an item of the output."""
    return {"id": f"{kind[:2]}_1", "type": kind, "status": "completed", **fields}


TEXT = numbered(*BEGINS, *message("A trace ", "is a ", "path 🙂."), ends(said("A trace is a path 🙂.")))
BEGUN = numbered(*BEGINS, *MESSAGE_BEGINS, delta("A trace "))
NEXT = len(BEGUN)
SITE = {"url": "https://example.com/traces", "title": "Traces"}
CITED = {"type": "url_citation", "start_index": 0, "end_index": 7, **SITE}
REFUSED = {"type": "refusal", "refusal": "I cannot help with that."}
REASONED = {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm. A path."}]}
IN_SUMMARY = {"item_id": "rs_1", "output_index": 0, "summary_index": 0}


def failed(code: str) -> list[Event]:
    """A response that fails after its first piece of text, and says so itself."""
    error = {"code": code, "message": "The model gave up."}
    return [*BEGUN, {**ends(status="failed", error=error), "sequence_number": NEXT}]


def broken(**fields: Any) -> list[Event]:
    """A response with an event of the type ``error`` after its first piece of text."""
    return [*BEGUN, {"type": "error", **fields, "sequence_number": NEXT}]


RESPONSES: dict[str, bytes] = {
    "refusal.complete": plain(
        numbered(
            *BEGINS,
            *MESSAGE_BEGINS[:1],
            {
                "type": "response.content_part.added",
                **IN_PART,
                "part": {"type": "refusal", "refusal": ""},
            },
            {"type": "response.refusal.delta", **IN_PART, "delta": "I cannot "},
            {"type": "response.refusal.delta", **IN_PART, "delta": "help with that."},
            {"type": "response.refusal.done", **IN_PART, "refusal": REFUSED["refusal"]},
            {"type": "response.content_part.done", **IN_PART, "part": REFUSED},
            ends({**said(""), "content": [REFUSED]}),
        )
    ),
    "reasoning-summary.complete": plain(
        with_item(
            {**REASONED, "encrypted_content": "ZW5jcnlwdGVk" * 30, "status": "completed"},
            {
                "type": "response.reasoning_summary_part.added",
                **IN_SUMMARY,
                "part": {"type": "summary_text", "text": ""},
            },
            {"type": "response.reasoning_summary_text.delta", **IN_SUMMARY, "delta": "Hm. "},
            {"type": "response.reasoning_summary_text.delta", **IN_SUMMARY, "delta": "A path."},
            {"type": "response.reasoning_summary_text.done", **IN_SUMMARY, "text": "Hm. A path."},
            {
                "type": "response.reasoning_summary_part.done",
                **IN_SUMMARY,
                "part": {"type": "summary_text", "text": "Hm. A path."},
            },
        )
    ),
    "reasoning-text.complete": plain(
        with_item(
            {**REASONED, "status": "completed", "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "response.reasoning_text.delta", "content_index": 0, "delta": "Hm."},
            {"type": "response.reasoning_text.done", "content_index": 0, "text": "Hm."},
        )
    ),
    "web-search.complete": plain(
        numbered(
            *BEGINS,
            *(
                {"type": f"response.web_search_call.{state}", "output_index": 0, "item_id": "ws_1"}
                for state in ("in_progress", "searching", "completed")
            ),
            *MESSAGE_BEGINS,
            delta("A trace."),
            {
                "type": "response.output_text.annotation.added",
                **IN_PART,
                "annotation_index": 0,
                "annotation": CITED,
            },
            ends(
                {
                    "id": "ws_1",
                    "type": "web_search_call",
                    "status": "completed",
                    "action": {"type": "search", "query": "trace"},
                },
                said("A trace.", CITED),
            ),
        )
    ),
    "file-search.complete": plain(
        with_item(
            call_of("file_search_call", queries=["trace"], results=None),
            *(
                {"type": f"response.file_search_call.{state}"}
                for state in ("in_progress", "searching", "completed")
            ),
        )
    ),
    "code-interpreter.complete": plain(
        with_item(
            call_of("code_interpreter_call", code="print(1)\n", container_id="cntr_1", outputs=None),
            {"type": "response.code_interpreter_call.in_progress"},
            {"type": "response.code_interpreter_call_code.delta", "delta": "print("},
            {"type": "response.code_interpreter_call_code.delta", "delta": "1)\n"},
            {"type": "response.code_interpreter_call_code.done", "code": "print(1)\n"},
            {"type": "response.code_interpreter_call.interpreting"},
            {"type": "response.code_interpreter_call.completed"},
        )
    ),
    "image-generation.complete": plain(
        with_item(
            call_of("image_generation_call", result="iVBORw0KGgo" * 200),
            {"type": "response.image_generation_call.in_progress"},
            {"type": "response.image_generation_call.generating"},
            *(
                {
                    "type": "response.image_generation_call.partial_image",
                    "partial_image_index": number,
                    "partial_image_b64": "iVBORw0KGgo" * 400,
                }
                for number in range(2)
            ),
            {"type": "response.image_generation_call.completed"},
        )
    ),
    "mcp-call.complete": plain(
        with_item(
            call_of("mcp_call", name="look", server_label="maps", arguments='{"at":"Kiel"}', output="ok"),
            {"type": "response.mcp_list_tools.in_progress"},
            {"type": "response.mcp_list_tools.completed"},
            {"type": "response.mcp_call.in_progress"},
            {"type": "response.mcp_call_arguments.delta", "delta": '{"at":'},
            {"type": "response.mcp_call_arguments.delta", "delta": '"Kiel"}'},
            {"type": "response.mcp_call_arguments.done", "arguments": '{"at":"Kiel"}'},
            {"type": "response.mcp_call.completed"},
        )
    ),
    # A tool that failed is no answer that failed.
    "mcp-call-fails.complete": plain(
        with_item(
            call_of("mcp_call", name="look", server_label="maps", arguments="{}", error="no such place"),
            {"type": "response.mcp_call.in_progress"},
            {"type": "response.mcp_call.failed"},
        )
    ),
    "mcp-approval.complete": plain(
        with_item(call_of("mcp_approval_request", name="look", server_label="maps", arguments="{}"))
    ),
    "function-call.complete": plain(
        with_item(
            call_of("function_call", call_id="call_1", name="weather", arguments='{"at":"Kiel"}'),
            *(
                {"type": "response.function_call_arguments.delta", "delta": piece}
                for piece in ('{"', "at", '":"K', 'iel"}')
            ),
            {
                "type": "response.function_call_arguments.done",
                "name": "weather",
                "arguments": '{"at":"Kiel"}',
            },
        )
    ),
    "custom-tool.complete": plain(
        with_item(
            call_of("custom_tool_call", call_id="call_1", name="shell", input="ls -l\n"),
            {"type": "response.custom_tool_call_input.delta", "delta": "ls "},
            {"type": "response.custom_tool_call_input.delta", "delta": "-l\n"},
            {"type": "response.custom_tool_call_input.done", "input": "ls -l\n"},
        )
    ),
    "computer-call.complete": plain(
        with_item(
            call_of(
                "computer_call", call_id="call_1", action={"type": "screenshot"}, pending_safety_checks=[]
            )
        )
    ),
    "queued.complete": plain(
        numbered(
            {"type": "response.queued", "response": response("queued", background=True)},
            BEGINS[1],
            *message("A path."),
            ends(said("A path."), background=True),
        )
    ),
    "incomplete-max-output-tokens.complete": plain(
        [
            *BEGUN,
            {
                **ends(status="incomplete", incomplete_details={"reason": "max_output_tokens"}),
                "sequence_number": NEXT,
            },
        ]
    ),
    "incomplete-content-filter.complete": plain(
        [
            *BEGUN,
            {
                **ends(status="incomplete", incomplete_details={"reason": "content_filter"}),
                "sequence_number": NEXT,
            },
        ]
    ),
    "failed-server-error." + UPSTREAM_FAILED: plain(failed("server_error")),
    "failed-rate-limit.failed-RateLimitError": plain(failed("rate_limit_exceeded")),
    "error-event." + UPSTREAM_FAILED: plain(broken(code="server_error", message="Oops.", param=None)),
    "error-event-rate-limit.failed-RateLimitError": plain(
        broken(code="rate_limit_exceeded", message="Slow down.", param=None)
    ),
    "error-event-in-an-object." + UPSTREAM_FAILED: plain(
        broken(error={"type": "server_error", "code": "server_error", "message": "Oops.", "param": None})
    ),
    "error-event-without-name.failed-RateLimitError": without_names(
        broken(code="rate_limit_exceeded", message="Slow down.", param=None)
    ),
    "garbage." + UPSTREAM_FAILED: plain(BEGUN) + b"event: response.output_text.delta\ndata: {oops\n\n",
    "cut-after-created.cut": plain(BEGUN[:1]),
    "cut-after-text.cut": plain(BEGUN),
    "cut-before-completed.cut": plain(TEXT[:-1]),
    "cut-within-an-event.cut": plain(TEXT)[:-400],
    "cut-within-a-character.cut": plain(TEXT).partition("🙂".encode())[0] + "🙂".encode()[:2],
    "no-event-names.complete": without_names(TEXT),
    "crlf.complete": with_ends(TEXT, "\r\n"),
    "cr.complete": with_ends(TEXT, "\r"),
    "comments.complete": with_comments(TEXT),
    "ids-and-retry.complete": with_ids(TEXT),
    "byte-order-mark.complete": BOM_UTF8 + plain(TEXT),
    "data-in-several-lines.complete": in_several_lines(TEXT),
    "many-empty-lines.complete": with_empty_lines(TEXT),
    "no-final-empty-line.complete": plain(TEXT).rstrip(b"\n"),
    "no-final-line-end-but-one.complete": plain(TEXT).rstrip(b"\n") + b"\n",
    "done-at-the-end.complete": plain(TEXT) + b"data: [DONE]\n\n",
    "surrogates-in-escapes.complete": escaped(TEXT),
    "events-of-the-future.complete": plain(
        numbered(
            *BEGINS,
            {"type": "response.hologram.delta", "output_index": 0, "delta": {"x": [1, 2.5, None]}},
            *message("A path."),
            {"type": "response.billing", "amount": 10**25},
            {**ends(said("A path.")), "mood": "good"},
        )
    ),
    "counts-beyond-64-bits.complete": plain(
        numbered(*BEGINS, *message("A path."), ends(said("A path."), usage={**USAGE, "input_tokens": 2**70}))
    ),
}

# ---- Messages ------------------------------------------------------------------------------------------

Block = tuple[Event, tuple[Event, ...]]


def start(**usage: Any) -> Event:
    """The first event of a message."""
    counts = {"input_tokens": 5, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 2}
    return {
        "type": "message_start",
        "message": {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "demo-1",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**counts, "output_tokens": 1, **usage},
        },
    }


def block(index: int, begins: Event, *deltas: Event) -> list[Event]:
    """The events of a block of content."""
    return [
        {"type": "content_block_start", "index": index, "content_block": begins},
        *({"type": "content_block_delta", "index": index, "delta": one} for one in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def stop(reason: str = "end_turn", sequence: str | None = None, **more: Any) -> list[Event]:
    """The last events of a message."""
    end = {"stop_reason": reason, "stop_sequence": sequence, **more.pop("in_delta", {})}
    return [
        {"type": "message_delta", "delta": end, "usage": {"output_tokens": 22}, **more},
        {"type": "message_stop"},
    ]


def text(*pieces: str, **fields: Any) -> Block:
    """A block of text."""
    return {"type": "text", "text": "", **fields}, tuple(
        {"type": "text_delta", "text": piece} for piece in pieces
    )


def json_of(*pieces: str) -> tuple[Event, ...]:
    """The deltas of a tool's input."""
    return tuple({"type": "input_json_delta", "partial_json": piece} for piece in pieces)


def tool(number: int, *pieces: str, kind: str = "tool_use", name: str = "weather", **fields: Any) -> Block:
    """A block with a call of a tool."""
    return {"type": kind, "id": f"toolu_{number}", "name": name, "input": {}, **fields}, json_of(*pieces)


def result(kind: str, content: Any, **fields: Any) -> Block:
    """A block with the result of a tool that the provider runs."""
    return {"type": kind, "tool_use_id": "toolu_0", "content": content, **fields}, ()


def whole(*blocks: Block, reason: str = "end_turn", **more: Any) -> list[Event]:
    """A message with these blocks."""
    events = [start()]
    for index, (begins, deltas) in enumerate(blocks):
        events += block(index, begins, *deltas)
    return events + stop(reason, **more)


THINKING: Block = (
    {"type": "thinking", "thinking": "", "signature": ""},
    (
        {"type": "thinking_delta", "thinking": "Hm. "},
        {"type": "thinking_delta", "thinking": "A path."},
        {"type": "signature_delta", "signature": "EqQBCkYIBxgCKkD/+==" * 12},
    ),
)
REDACTED: Block = ({"type": "redacted_thinking", "data": "EroBCkYIBxgC+/==" * 8}, ())
PING: Event = {"type": "ping"}
SHORT = whole(text("A trace ", "is a path 🙂."))
SHORT_BEGUN = SHORT[:3]
FOUND = {
    "type": "web_search_result",
    "title": "Traces",
    "url": "https://example.com/traces",
    "encrypted_content": "EqgfCioIARgB" * 10,
    "page_age": None,
}
CITATION = {
    "type": "citations_delta",
    "citation": {
        "type": "web_search_result_location",
        "cited_text": "A path.",
        "encrypted_index": "Eo8B",
        "title": "Traces",
        "url": "https://example.com/traces",
    },
}
IN_DOCUMENT = {
    "type": "citations_delta",
    "citation": {
        "type": "char_location",
        "cited_text": "A path.",
        "document_index": 0,
        "document_title": None,
        "start_char_index": 0,
        "end_char_index": 7,
        "file_id": None,
    },
}


def cited(citation: Event) -> Block:
    """A block of text with a citation behind it."""
    return {"type": "text", "text": "", "citations": []}, (*text("A path.")[1], citation)


def says(kind: str) -> list[Event]:
    """A message that fails after its first piece of text."""
    return [*SHORT_BEGUN, {"type": "error", "error": {"type": kind, "message": "Oops."}}]


def pings_between(events: Iterable[Event]) -> list[Event]:
    """Events with a ping behind each but the last."""
    *others, last = events
    return [one for event in others for one in (event, PING)] + [last]


MESSAGES: dict[str, bytes] = {
    "thinking.complete": plain(whole(THINKING, text("A path."))),
    "redacted-thinking.complete": plain(whole(REDACTED, text("A path."))),
    "thinking-between-tools.complete": plain(
        whole(THINKING, tool(0, '{"at":', '"Kiel"}'), THINKING, text("A path."), reason="tool_use")
    ),
    "thinking-without-text.complete": plain(
        whole((THINKING[0], THINKING[1][-1:]), text("A path."), reason="end_turn")
    ),
    "web-search.complete": plain(
        whole(
            text("Let me look."),
            tool(0, '{"query":', ' "trace"}', kind="server_tool_use", name="web_search"),
            result("web_search_tool_result", [FOUND]),
            cited(CITATION),
        )
    ),
    "web-search-fails.complete": plain(
        whole(
            tool(0, "{}", kind="server_tool_use", name="web_search"),
            result(
                "web_search_tool_result",
                {"type": "web_search_tool_result_error", "error_code": "max_uses_exceeded"},
            ),
            text("I do not know."),
        )
    ),
    "code-execution.complete": plain(
        whole(
            tool(0, '{"command": "ls"}', kind="server_tool_use", name="bash_code_execution"),
            result(
                "bash_code_execution_tool_result",
                {
                    "type": "bash_code_execution_result",
                    "stdout": "a\n",
                    "stderr": "",
                    "return_code": 0,
                    "content": [],
                },
            ),
            text("One file."),
            in_delta={"container": {"id": "container_1", "expires_at": "2026-11-27T12:00:00Z"}},
        )
    ),
    "mcp-tool.complete": plain(
        whole(
            tool(0, '{"at":"Kiel"}', kind="mcp_tool_use", server_name="maps"),
            result("mcp_tool_result", [{"type": "text", "text": "ok"}], is_error=False),
            text("There."),
        )
    ),
    "citations.complete": plain(whole(cited(IN_DOCUMENT))),
    "tool-in-odd-pieces.complete": plain(
        whole(tool(0, "", '{"a', 't": "K', "\\u00", 'f6ln"', "}"), reason="tool_use")
    ),
    "parallel-tools.complete": plain(
        whole(tool(0, '{"at":"Kiel"}'), tool(1, '{"at":"Köln"}'), tool(2, ""), reason="tool_use")
    ),
    "pings-everywhere.complete": plain(pings_between(SHORT)),
    "ping-first.complete": plain([PING, *SHORT]),
    "pause-turn.complete": plain(
        whole(tool(0, "{}", kind="server_tool_use", name="web_search"), reason="pause_turn")
    ),
    "refusal.complete": plain(whole(text("I can"), reason="refusal")),
    "refusal-without-text.complete": plain(whole(reason="refusal")),
    "context-window.complete": plain(whole(text("A tra"), reason="model_context_window_exceeded")),
    "max-tokens.complete": plain(whole(text("A tra"), reason="max_tokens")),
    "stop-sequence.complete": plain(whole(text("A "), reason="stop_sequence", sequence="trace\n")),
    "usage-of-caches.complete": plain(
        [
            start(
                cache_creation={"ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": 0},
                service_tier="standard",
                server_tool_use={"web_search_requests": 1},
            ),
            *whole(text("A path."), context_management={"applied_edits": []})[1:],
        ]
    ),
    "long-event.complete": plain(whole(text("long " * 6_000))),
    "error-overloaded." + UPSTREAM_FAILED: plain(says("overloaded_error")),
    "error-api." + UPSTREAM_FAILED: plain(says("api_error")),
    "error-rate-limit.failed-RateLimitError": plain(says("rate_limit_error")),
    "error-invalid-request.failed-BadRequestError": plain(says("invalid_request_error")),
    "error-without-name.failed-RateLimitError": without_names(says("rate_limit_error")),
    "error-within-a-tool." + UPSTREAM_FAILED: plain(
        [*whole(tool(0, '{"at":'))[:3], says("overloaded_error")[-1]]
    ),
    "garbage." + UPSTREAM_FAILED: plain(SHORT_BEGUN) + b"event: content_block_delta\ndata: {oops\n\n",
    "cut-after-start.cut": plain(SHORT[:1]),
    "cut-after-text.cut": plain(SHORT_BEGUN),
    "cut-before-stop.cut": plain(SHORT[:-1]),
    "cut-within-an-event.cut": plain(SHORT)[:-90],
    "cut-within-a-tool.cut": plain(whole(tool(0, '{"at":'))[:3]),
    "cut-within-a-character.cut": plain(SHORT).partition("🙂".encode())[0] + "🙂".encode()[:2],
    "no-event-names.complete": without_names(SHORT),
    "crlf.complete": with_ends(SHORT, "\r\n"),
    "cr.complete": with_ends(SHORT, "\r"),
    "comments.complete": with_comments(SHORT),
    "ids-and-retry.complete": with_ids(SHORT),
    "byte-order-mark.complete": BOM_UTF8 + plain(SHORT),
    "data-in-several-lines.complete": in_several_lines(SHORT),
    "many-empty-lines.complete": with_empty_lines(SHORT),
    "no-final-empty-line.complete": plain(SHORT).rstrip(b"\n"),
    "no-final-line-end-but-one.complete": plain(SHORT).rstrip(b"\n") + b"\n",
    "done-at-the-end.complete": plain(SHORT) + b"data: [DONE]\n\n",
    "surrogates-in-escapes.complete": escaped(SHORT),
    "events-of-the-future.complete": plain(
        [
            start(),
            {"type": "message_mood", "mood": {"good": 10**25}},
            *block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": "A path."}),
            *block(
                1, {"type": "hologram", "size": 1.5}, {"type": "hologram_delta", "light": [1, None, True]}
            ),
            *stop("end_turn"),
        ]
    ),
}
WRITTEN = {"responses": RESPONSES, "messages": MESSAGES}


def main() -> int:
    """Write everything anew."""
    for protocol in PROTOCOLS:
        for old in (FOLDER / protocol).glob("written-*.sse"):
            old.unlink()
        for name, content in WRITTEN[protocol].items():
            write(protocol, f"written-{name}", content)
        sys.stdout.write(f"{protocol}: {len(WRITTEN[protocol])}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
