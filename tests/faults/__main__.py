"""``make faults``: plays every fault on every route of a real process and prints what came of it.

Arguments are parts of names: only the cases whose name contains one of them are played, such as ``429`` or
``"messages, streamed"``. With ``--write`` the result of the run is kept in ``RESULTS.md``.
"""

import itertools
import sys
import time

from tests.fakes.otlp import OtlpReceiver
from tests.faults.bench import Bench, changed, differences
from tests.faults.cases import Case, product
from tests.faults.report import Report, say
from tests.faults.table import VARIABLES
from tests.faults.traces import COUNTERS, differences_in_counters, differences_in_telemetry


def main(arguments: list[str]) -> int:
    """Play the cases; 1 when one is otherwise than the table says, 2 when no case has such a name."""
    parts = [argument for argument in arguments if argument != "--write"]
    chosen = [case for case in product() if not parts or any(part in str(case) for part in parts)]
    if not chosen:
        sys.stderr.write(f"No case has any of {parts} in its name.\n")
        return 2
    report, started_s = Report(), time.monotonic()
    with OtlpReceiver() as receiver, Bench(VARIABLES, receiver) as bench:
        for title, cases in groups(chosen):
            report.begin(title)
            play(bench, cases, report)
    seconds = time.monotonic() - started_s
    say("{}, after {:.0f} s\n", report.verdict, seconds)
    if "--write" in arguments:
        report.write(seconds)
    return int(report.wrong > 0)


def groups(cases: list[Case]) -> list[tuple[str, list[Case]]]:
    """The cases that are played at the same time: those of a route, or those about an absent upstream."""

    def title(case: Case) -> str:
        return case.group if case.fault.place == "answering" else case.fault.name

    absent = sorted(cases, key=lambda case: case.fault.place)
    return [(name, list(group)) for name, group in itertools.groupby(absent, title)]


def play(bench: Bench, cases: list[Case], report: Report) -> None:
    """Play cases at the same time, and report them in their order."""
    bench.prepare(cases)
    bench.receiver.clear()
    before = bench.counts(*COUNTERS)
    outcomes = bench.play_all(cases)
    for case, outcome in zip(cases, outcomes, strict=True):
        found = differences(case, outcome)
        found += differences_in_telemetry(bench.receiver, case, outcome)
        report.add(case, outcome, found)
    report.add_counters(differences_in_counters(cases, changed(before, bench.counts(*COUNTERS))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
