"""What a run over the table saw: printed as it comes, and written to ``RESULTS.md``."""

import platform
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.cases import Case, Outcome
from tests.faults.table import ALL

RESULTS = Path(__file__).with_name("RESULTS.md")
HEADING = "# What `make faults` saw\n"
ROW = "  {:<34} {:>6}  {:<21} {:>4} {:>8} {:>8}  {}\n"
INTRODUCTION = """
One run of `make faults ARGS=--write` (`python -m tests.faults`), with Python {python}: {faults} rows on
{routes} routes, whole and, where a route has streams, streamed. These are {cases} calls of one real
process; they took {seconds:.0f} s.

Of each call, these were compared with the table: the status, the error's name in the shape of the
route's protocol and the ids in it, `Retry-After`, `X-LLM-Attempts`, `Server-Timing`, the deadline, the
bytes of the answer, the requests that the upstream saw, whether it was left alone afterwards, every log
line, the span tree with the events on it, and their log records. The counters of calls and of attempts
were compared for each route.

`json` and `events` are answers and streams that are asked for, and `stored` are answers about stored
responses. `unasked` are streams where the upstream decides whether it answers with one, and `bytes` are
recordings, both of audio.

{verdict}

"""


@dataclass
class Report:
    """The cases that were played."""

    played: list[tuple[Case, Outcome, list[str]]] = field(default_factory=list)
    in_counters: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """How many cases, and counters, are otherwise than the table says."""
        return sum(bool(found) for _, _, found in self.played) + len(self.in_counters)

    def begin(self, title: str) -> None:
        """Print the heading of a group of cases."""
        say("{}\n", title)
        say(ROW, "fault", "status", "error", "seen", "attempts", "seconds", "first line ... last line")

    def add(self, case: Case, outcome: Outcome, differences: list[str]) -> None:
        """Print one case; of its log lines, the first and the last about attempts."""
        self.played.append((case, outcome, differences))
        answer = outcome.answer
        lines = [line for line in outcome.messages if line.startswith(("Attempt", "Retrying", "Giving up"))]
        both = f"{lines[0]} ... {lines[-1]}" if len(lines) > 1 else "".join(lines)
        attempts = answer.headers.get("x-llm-attempts", "-")
        say(
            ROW,
            case.fault.name if case.fault.place == "answering" else str(case),
            *(answer.status, case.fault.error or "-", outcome.seen, attempts, f"{answer.seconds:.2f}", both),
        )
        for difference in differences:
            say("    DIFFERS {}\n", difference)

    def add_counters(self, differences: Iterable[str]) -> None:
        """Print what differs in the counters of a group."""
        for difference in differences:
            self.in_counters.append(difference)
            say("    DIFFERS {}\n", difference)

    @property
    def verdict(self) -> str:
        """How many cases are as the table says."""
        right = sum(not found for _, _, found in self.played)
        return f"{right} of {len(self.played)} cases are as the table says" + (
            f"; {len(self.in_counters)} counters are not" if self.in_counters else "; so are all counters"
        )

    def write(self, seconds: float) -> None:
        """Put the run into ``RESULTS.md``, behind what else stands there."""
        before = RESULTS.read_text().partition(HEADING)[0].rstrip("\n")
        routes = {case.route.name for case, _, _ in self.played}
        faults = {(case.fault.name, " ".join(case.fault.calls)) for case, _, _ in self.played}
        text = INTRODUCTION.format(
            python=".".join(platform.python_version_tuple()[:2]),
            faults=len(faults),
            routes=len(routes),
            cases=len(self.played),
            seconds=seconds,
            verdict=self.verdict + ".",
        )
        RESULTS.write_text("\n\n".join([*([before] if before else []), HEADING + text + self._table()]))

    def _table(self) -> str:
        rows = defaultdict(list)
        for entry in self.played:
            rows[entry[0].fault].append(entry)
        lines = [
            "| fault | calls | status | error | attempts | slowest | whole, as the table says | streamed |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for fault, entries in rows.items():
            slowest = max(outcome.answer.seconds for _, outcome, _ in entries)
            cells = [
                *(
                    fault.name,
                    "all" if fault.calls == ALL else ", ".join(fault.calls),
                    f"{fault.status}",
                    fault.error or "-",
                ),
                *(f"{fault.attempts}", f"{slowest:.1f} s"),
            ]
            for streamed in (False, True):
                of = [not found for case, _, found in entries if case.streamed is streamed]
                cells.append(f"{sum(of)} of {len(of)}" if of else "-")
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def say(row: str, *values: object) -> None:
    """Print a line at once."""
    sys.stdout.write(row.format(*values))
    sys.stdout.flush()
