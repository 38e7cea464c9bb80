"""The page about an id: one file of HTML with its styles and its drawings, without scripts and other files.

Everything that comes from outside is escaped, and the policy of the page lets a browser run and load nothing.
"""

import math
from base64 import b64encode
from collections.abc import Iterable, Iterator
from hashlib import sha256
from html import escape
from typing import Final

from service.errors import ErrorFacts, ServiceError
from service.explain.facts import attempt_text, ended_text, error_facts, facts_of, searched_text
from service.explain.report import AttemptReport, Explanation, RequestReport, seconds

STYLE: Final = """
body { margin: 2rem auto; max-width: 60rem; padding: 0 1.25rem; background: #fff; color: #1b1f24;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.05rem; font-weight: 600; color: #4b5563; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; line-height: 1.35; margin: 0 0 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
article { border: 1px solid #d0d7de; border-left: 6px solid #6b7280; border-radius: 6px;
  padding: 1.25rem 1.5rem; margin: 0 0 1.5rem; }
article.success, article.cached { border-left-color: #1a7f37; }
article.error { border-left-color: #b42318; }
article.cancelled { border-left-color: #9a6700; }
dl { display: grid; grid-template-columns: 8.5rem 1fr; gap: .3rem 1rem; margin: 0; }
dt { color: #4b5563; }
dd { margin: 0; overflow-wrap: anywhere; }
section { background: #fff5f4; border: 1px solid #f3c7c2; border-radius: 6px; padding: .9rem 1.1rem;
  margin: 0 0 1.25rem; }
section p { margin: 0 0 .6rem; }
.cancelled section { background: #fff8e6; border-color: #ecd9a0; }
pre { background: #f6f8fa; border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; }
code, pre { font: 14px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
svg { display: block; width: 100%; height: auto; margin: 0 0 .5rem; }
svg text { font: 13px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #1b1f24; }
svg .tick { fill: #4b5563; font-size: 12px; }
footer, .note { color: #4b5563; font-size: .9rem; }
a { color: #0550ae; }
"""

POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{b64encode(sha256(STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page's ``Content-Security-Policy``: its own style sheet, and nothing else."""

HOW_TO_OPEN: Final = """<h3>How to open this page</h3>
<p>It needs your token or API key in a header field, which a browser does not send by itself. Neither belongs
into an address. Each of these commands writes the page to a file:</p>
<pre>curl -H "Authorization: Bearer $LLMOPS_TOKEN" -H "Accept: text/html" URL/requests/{0} &gt; request.html

LLMOPS_TOKEN=… python -m service explain {0} --url URL --html &gt; request.html</pre>"""

LABEL_X: Final = 0
CHART_X: Final = 110
CHART_WIDTH: Final = 390
TEXT_X: Final = CHART_X + CHART_WIDTH + 14
WIDTH: Final = 900
ROW: Final = 30
BAR: Final = 16
MAX_TEXT_CHARS: Final = 54

COLOURS: Final = {
    "call": "#8c959f",
    "cache": "#8250df",
    "success": "#2da44e",
    "error": "#cf222e",
    "cancelled": "#bf8700",
    "wait": "#d0d7de",
    "piece": "#0550ae",
}
STEPS: Final = (0.2, 0.5, 1, 2)
MAX_TICKS: Final = 5
SHORTEST_S: Final = 1e-6


def page(explanation: Explanation) -> str:
    """The page about all requests of an id."""
    requests = "".join(_request(request) for request in explanation.requests)
    more = "<p class=note>There are more requests with this id.</p>" if explanation.more else ""
    searched = escape(searched_text(dict(explanation.searched)))
    title = f"<h1>What became of {escape(explanation.id)}</h1>"
    body = f"{title}{requests}{more}<footer>Searched: {searched}.</footer>"
    return _document(f"Request {explanation.id}", body)


def error_page(error: ErrorFacts, kind: type[ServiceError], incident_id: str, asked: str | None) -> str:
    """The page that takes the place of an error's body.

    Args:
        error: What is to be said.
        kind: The error's class.
        incident_id: This request's own.
        asked: The id that was asked for, where it has the form of one.
    """
    named = asked or "ID"
    how = ""
    if error.status == 401:  # noqa: PLR2004 - the status of AuthenticationError
        how = HOW_TO_OPEN.format(escape(named))
    facts = _list([("Meaning", kind.meaning), ("What to do", kind.advice), ("Incident", incident_id)])
    body = (
        f"<h1>{escape(named)}</h1><article class=error><h2>{error.status} {escape(error.name)}</h2>"
        f"<p>{escape(error.message)}</p>{facts}{how}</article>"
    )
    return _document(f"{error.status} {error.name}", body)


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _request(request: RequestReport) -> str:
    error = ""
    if request.error is not None:
        said = f"<p><strong>{escape(request.error.message)}</strong></p>" if request.error.message else ""
        error = f"<section>{said}{_list(error_facts(request.error))}</section>"
    drawn = ""
    if request.times.call_s is not None:
        ended = ended_text(request)
        note = "" if ended is None else f"<p class=note>{escape(ended)}</p>"
        drawn = f"<h3>Time line</h3>{_time_line(request, request.times.call_s)}{note}"
    links = [
        f'<a href="{escape(url)}" rel="noreferrer">{name}</a>'
        for name, url in (
            ("Trace in Grafana", request.links.trace),
            ("Log lines in Grafana", request.links.logs),
            ("Record in MLflow", request.links.record),
        )
        if url is not None
    ]
    more = f"<h3>More</h3><p>{' · '.join(links)}</p>" if links else ""
    return (
        f"<article class={request.outcome}><h2>{escape(request.summary)}</h2>{error}"
        f"{_list(facts_of(request))}{drawn}{more}</article>"
    )


def _list(facts: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return f"<dl>{rows}</dl>"


def _time_line(request: RequestReport, call_s: float) -> str:
    """The call, its look-up, its attempts and its waits, drawn to one scale."""
    ends = [call_s, *(each.started_s + each.duration_s for each in request.attempts)]
    scale = CHART_WIDTH / max(*ends, SHORTEST_S)
    rows = list(_rows(request, call_s))
    height = ROW * len(rows) + 24
    parts = list(_ticks(max(ends), scale, ROW * len(rows)))
    for number, (label, bars, text) in enumerate(rows):
        top = number * ROW
        middle = top + ROW / 2 + 4
        parts.append(f'<text x="{LABEL_X}" y="{middle:g}">{escape(label)}</text>')
        for start_s, length_s, colour in bars:
            x, y = CHART_X + start_s * scale, top + (ROW - BAR) / 2
            place = f'x="{x:.1f}" y="{y:g}" width="{max(length_s * scale, 2):.1f}" height="{BAR}"'
            parts.append(f'<rect {place} rx="2" fill="{COLOURS[colour]}"/>')
        shown = text if len(text) <= MAX_TEXT_CHARS else f"{text[: MAX_TEXT_CHARS - 1]}…"
        parts.append(f'<text x="{TEXT_X}" y="{middle:g}">{escape(shown)}</text>')
    first_s = request.times.first_piece_s
    if first_s is not None:
        x = CHART_X + first_s * scale
        parts.append(
            f'<path d="M{x:.1f} 0V{ROW * len(rows)}" stroke="{COLOURS["piece"]}" stroke-width="1.5" '
            'stroke-dasharray="4 3"/>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Time line of the call">'
        f"{''.join(parts)}</svg>"
    )


Bar = tuple[float, float, str]


def _rows(request: RequestReport, call_s: float) -> Iterator[tuple[str, list[Bar], str]]:
    text = f"{request.outcome}, {seconds(call_s)}"
    if request.times.first_piece_s is not None:
        text += f"; first piece (dashed) at {seconds(request.times.first_piece_s)}"
    yield "Call", [(0.0, call_s, "call")], text
    if request.times.cache_s is not None and request.cache is not None:
        result = "failed" if request.cache.failed else request.cache.result
        said = f"{result}, {seconds(request.times.cache_s)}"
        yield "Cache", [(0.0, request.times.cache_s, "cache")], said
    for attempt in request.attempts:
        bars = [(attempt.started_s, attempt.duration_s, _colour(attempt))]
        if attempt.wait_s:
            # A wait that the call's end cut short is drawn as far as it went.
            start_s = attempt.started_s + attempt.duration_s
            bars.append((start_s, max(0.0, min(attempt.wait_s, call_s - start_s)), "wait"))
        yield f"Attempt {attempt.number}", bars, attempt_text(attempt)


def _colour(attempt: AttemptReport) -> str:
    if attempt.error is None:
        return "success"
    return "cancelled" if attempt.error == "cancelled" else "error"


def _ticks(end_s: float, scale: float, bottom: int) -> Iterator[str]:
    """Lines at round times, and the times below them."""
    step_s = _step_s(max(end_s, SHORTEST_S))
    for number in range(int(end_s / step_s) + 1):
        x = CHART_X + number * step_s * scale
        yield f'<path d="M{x:.1f} 0V{bottom}" stroke="#e5e7eb"/>'
        text = "0" if not number else _tick_text(number * step_s)
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>'


def _tick_text(at_s: float) -> str:
    return f"{at_s:g} s" if at_s >= 1 else f"{at_s * 1_000:g} ms"


def _step_s(end_s: float) -> float:
    """The distance between two lines: 1, 2 or 5 of a power of ten, so that there are few lines."""
    unit = 10.0 ** math.floor(math.log10(end_s))
    step = next(step for step in STEPS if end_s / (step * unit) <= MAX_TICKS)
    return float(f"{step * unit:g}")
