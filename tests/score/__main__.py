"""`python -m tests.score` plays the request matrix and prints the Instrumentation Score with its evidence."""

import sys
from collections import Counter

from tests.score.capture import Capture
from tests.score.declared import Comparison
from tests.score.matrix import play
from tests.score.rules import RULES, WEIGHTS, Rule, Verdict, orphans, score

SERVICE = "llmops-api"
PERFECT = 100
MOST = 10
"""How much of what breaks a rule is shown."""


def verdicts(capture: Capture) -> list[tuple[Rule, Verdict]]:
    """Each rule, over the service's telemetry; the callers' spans are there for those below them."""
    own = capture.of(SERVICE)
    return [(rule, rule.check(capture if rule.id == "SPA-002" else own)) for rule in RULES]


def duplicates(capture: Capture) -> list[str]:
    """Spans that came twice, and traces with two SERVER spans of the service."""
    spans = Counter(f"span {span.name} {span.span_id}" for span in capture.spans)
    servers = Counter(f"SERVER in {span.trace_id}" for span in capture.spans if span.kind == "SERVER")
    return sorted(what for what, number in (*spans.items(), *servers.items()) if number > 1)


def report(capture: Capture) -> tuple[str, bool]:
    """The report, and whether the score is 100 and everything is declared, once, and below its parent."""
    comparison = Comparison(capture.of(SERVICE))
    results = verdicts(capture)
    lines = []
    for rule, verdict in results:
        said = "BROKEN" if verdict.broken else "kept"
        lines.append(f"{said:6} {rule.id} {WEIGHTS[rule.impact]:2} {rule.description}: {verdict.evidence}")
        lines += [f"         {one}" for one in verdict.broken[:MOST]]
    kept = sum(WEIGHTS[rule.impact] for rule, verdict in results if not verdict.broken)
    total = sum(WEIGHTS[rule.impact] for rule, _ in results)
    reached = score(results)
    found, lost, twice = comparison.undeclared, orphans(capture), duplicates(capture)
    seen = f"{len(capture.spans)} spans, {len(capture.logs)} log records, {len(capture.points)} points"
    lines += [
        "",
        f"Instrumentation Score: {reached:g}",
        f"{kept} of {total} by weight, {len(results)} rules, {seen}",
        f"{len(found)} undeclared, {len(lost)} orphans, {len(twice)} duplicates",
        *[f"  {one}" for one in found],
        *[f"  orphan {span.name}" for span in lost],
        *[f"  {one}" for one in twice],
        "Declared, and not seen in this run:",
        *[f"  {one}" for one in comparison.unseen],
    ]
    return "\n".join(lines) + "\n", reached == PERFECT and not (found or lost or twice)


def main() -> int:
    """Play the matrix and print the report."""
    text, good = report(play())
    sys.stdout.write(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
