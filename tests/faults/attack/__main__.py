"""``make attack``: attacks a real service process for less than three minutes, while a second user uses it.

The exit status is 1 when anything is otherwise than it should be. Everything is on this machine's loopback
addresses. ``--seed`` begins the fuzzers at another seed; every seed that was used is printed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TypeVar

from tests.faults.attack import verdicts
from tests.faults.attack.costs import LIMIT_S, search
from tests.faults.attack.fuzz import cut_everywhere, fuzz
from tests.faults.attack.rows import Row
from tests.faults.attack.rows_alone import ALONE, failing
from tests.faults.attack.rows_bytes import BYTES
from tests.faults.attack.rows_callers import CALLERS
from tests.faults.attack.rows_cost import COST
from tests.faults.attack.rows_records import RECORDS
from tests.faults.attack.target import MIB, Target, wait_for

T = TypeVar("T")
TOTAL_S = 150.0
"""When the fuzzers end, after the start; the rest of three minutes is left to a busy machine."""

MIN_FUZZ_S = 8.0
CUTS_LIMIT_S = 12.0
SEARCH_SHARE = 0.45
WARM_CALLS = 60


class Report:
    """Prints what is seen, and counts what is wrong."""

    def __init__(self) -> None:
        self.rows = 0
        self.wrong = 0
        self._started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    def say(self, text: str = "") -> None:
        """Print a line at once."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def verdict(
        self, name: str, seen: str, problems: Sequence[str], sent: str = "", wanted: str = ""
    ) -> None:
        """Print what came of an attack."""
        self.rows += 1
        self.wrong += bool(problems)
        self.say(f"[{self.elapsed_s:5.1f} s] {'WRONG' if problems else 'ok   '} {name}")
        if sent:
            self.say(f"      sent: {sent}")
            self.say(f"      wanted: {wanted}")
        self.say(f"      seen: {seen}")
        for problem in problems:
            self.say(f"      WRONG: {problem}")

    def play(self, title: str, rows: Sequence[Row[T]], against: T, target: Target) -> None:
        """Play the rows of one kind."""
        self.say(f"\n{title}\n")
        for row in rows:
            failed = len(target.second.failures)
            found = row.verdict(against)
            failures = [f"meanwhile, {failure}" for failure in target.second.failures[failed:][:3]]
            self.verdict(row.name, found.seen, [*found.problems, *failures], row.sent, row.wanted)
            target.upstream.clear()


def main(arguments: Sequence[str]) -> int:
    """Attack; 1 when anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.attack", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the fuzzers' first seed")
    seed = parser.parse_args(arguments).seed
    report = Report()
    with failing() as alone:
        report.play("A store or a disk that fails", ALONE.all, alone, alone.target)
        other = summary(report, alone.target, alone.target.gauges.resident_bytes())
    with Target() as target:
        wait_for(lambda: target.second.made >= WARM_CALLS, 20)
        before = target.gauges.resident_bytes()
        report.play("Bytes and connections", BYTES.all, target, target)
        report.play("Who can stop whom", CALLERS.all, target, target)
        report.play("What a request may cost", COST.all, target, target)
        report.play("Whose record it is", RECORDS.all, target, target)
        answered = fuzzers(report, target, seed)
        time.sleep(1)
        problems = summary(report, target, before, answered)
    problems += other
    report.say(
        f"\n{report.rows - report.wrong} of {report.rows} attacks as wanted, in {report.elapsed_s:.0f} s"
    )
    for problem in problems:
        report.say(f"WRONG: {problem}")
    return int(bool(report.wrong or problems))


def fuzzers(report: Report, target: Target, seed: int) -> frozenset[str]:
    """Run the fuzzers; the trace ids that damaged bytes made to requests."""
    report.say("\nFuzzers\n")
    cuts, wrong = 0, []
    end_s = report.elapsed_s + CUTS_LIMIT_S
    for sent, problems in cut_everywhere(target):
        cuts += 1
        wrong += [f"cut at {sent.cuts[0]}: {problem}" for problem in problems]
        if report.elapsed_s > end_s or len(wrong) > verdicts.MAX_SHOWN:
            break
    report.verdict("one conversation cut at every byte", f"{cuts} conversations of 4 requests", wrong)

    left_s = max(2 * MIN_FUZZ_S, TOTAL_S - report.elapsed_s)
    searched = search(target, SEARCH_SHARE * left_s, seed)
    worst = searched.worst
    over = [f"{one.held_s * 1_000:.0f} ms, {one.status}: {one.what}" for one in searched.over]
    report.verdict(
        f"no request keeps the event loop for {LIMIT_S * 1_000:.0f} ms of processor time",
        f"{searched.requests} requests, seeds {seed} to {seed + searched.seeds - 1}; the worst: "
        f"{worst.held_s * 1_000:.1f} ms, {worst.status}: {worst.what}",
        [*over[: verdicts.MAX_SHOWN], *(f"500: {what}" for what in searched.errors)],
    )

    fuzzed = fuzz(target, (1 - SEARCH_SHARE) * left_s, seed)
    report.verdict(
        "one answer for each request, in order, and none for bytes of a body",
        f"{fuzzed.conversations} conversations, {fuzzed.requests} requests, "
        f"seeds {seed} to {seed + fuzzed.seeds - 1}",
        fuzzed.problems,
    )
    return frozenset(fuzzed.answered)


def summary(report: Report, target: Target, before: int, answered: frozenset[str] = frozenset()) -> list[str]:
    """Print the numbers of a process; what is wrong with them."""
    after, peak, second = target.gauges.resident_bytes(), target.gauges.peak_bytes(), target.second
    made, failed = second.made, len(second.failures)
    statuses = ", ".join(f"{status}: {number}" for status, number in sorted(target.tally.statuses.items()))
    kinds = ", ".join(f"{kind}: {number}" for kind, number in sorted(second.calls.items()))
    report.say(f"\nInputs tried: {target.tally.inputs}")
    report.say(f"Answers by status: {statuses}")
    report.say(
        f"Memory: {before / MIB:.0f} MiB before, {after / MIB:.0f} MiB after ({after / before:.2f} times), "
        f"peak {peak / MIB:.0f} MiB"
    )
    report.say(f"The second user: {made - failed} of {made} calls succeeded ({kinds})")
    problems = verdicts.of_second_user(made, second.failures) + verdicts.of_memory(before, after)
    return problems + verdicts.of_log(target.process.text(), answered)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
