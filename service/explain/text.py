"""What became of an id, as text for a terminal."""

from collections.abc import Iterable, Iterator
from typing import Final

from service.explain.facts import attempt_text, ended_text, error_facts, facts_of, searched_text
from service.explain.report import Explanation, RequestReport, seconds

NAME_CHARS: Final = 14
LINE_CHARS: Final = 40


def text(explanation: Explanation) -> str:
    """The same as the page, with a time line of characters. Nothing in it controls a terminal."""
    lines = [f"What became of {explanation.id}"]
    for request in explanation.requests:
        lines += ["", *_request(request)]
    if explanation.more:
        lines += ["", "There are more requests with this id."]
    lines += ["", f"Searched: {searched_text(dict(explanation.searched))}."]
    return "".join(_printable(line) + "\n" for line in lines)


def _printable(line: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in line)


def _request(request: RequestReport) -> Iterator[str]:
    yield request.summary
    if request.error is not None:
        if request.error.message is not None:
            yield f"  {request.error.message}"
        yield from _list(error_facts(request.error))
        yield ""
    yield from _list(facts_of(request))
    if request.times.call_s is None:
        return
    yield ""
    for name, bar, said in _rows(request, request.times.call_s):
        yield f"  {name:<{NAME_CHARS}}|{bar:<{LINE_CHARS}}| {said}"
    if (ended := ended_text(request)) is not None:
        yield f"  {ended}"


def _list(facts: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, said in facts:
        yield f"  {name:<{NAME_CHARS}} {said}"


def _rows(request: RequestReport, call_s: float) -> Iterator[tuple[str, str, str]]:
    """The call, its look-up, its attempts (``#``, failed ones ``x``) and its waits (``.``), to one scale."""
    ends = [call_s, *(each.started_s + each.duration_s for each in request.attempts)]
    scale = LINE_CHARS / max(*ends, 1e-6)

    def bar(start_s: float, length_s: float, mark: str) -> str:
        place = min(int(start_s * scale), LINE_CHARS - 1)
        return " " * place + mark * max(1, min(round(length_s * scale), LINE_CHARS - place))

    yield "call", bar(0, call_s, "="), f"{request.outcome}, {seconds(call_s)}"
    if request.times.cache_s is not None and request.cache is not None:
        yield "cache", bar(0, request.times.cache_s, "c"), f"{request.cache.result}"
    for attempt in request.attempts:
        drawn = bar(attempt.started_s, attempt.duration_s, "#" if attempt.error is None else "x")
        if attempt.wait_s:
            drawn = (drawn + "." * round(attempt.wait_s * scale))[:LINE_CHARS]
        yield f"attempt {attempt.number}", drawn, attempt_text(attempt)
