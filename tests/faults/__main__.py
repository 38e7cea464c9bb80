"""``make faults``: plays the fault table against a real process and prints what came of it.

Arguments are parts of names: only the rows whose name contains one of them are played.
"""

import sys

from tests.faults.bench import Bench, Outcome, differences
from tests.faults.table import FAULTS, VARIABLES, Fault

ROW = "{:<28} {:>6}  {:<21} {:>4} {:>8} {:>8}  {}\n"


def main(parts: list[str]) -> int:
    """Play the rows; 1 when one is otherwise than the table says, 2 when no row has such a name."""
    chosen = [fault for fault in FAULTS if not parts or any(part in fault.name for part in parts)]
    if not chosen:
        sys.stderr.write(f"No row has any of {parts} in its name.\n")
        return 2
    say(ROW, "fault", "status", "error", "seen", "attempts", "seconds", "first line ... last line")
    wrong = 0
    with Bench(VARIABLES) as bench:
        for fault in chosen:
            outcome = bench.play(fault)
            show(fault, outcome)
            found = differences(fault, outcome)
            wrong += bool(found)
            for difference in found:
                say("  DIFFERS {}\n", difference)
    say("{} of {} rows are as the table says\n", len(chosen) - wrong, len(chosen))
    return int(wrong > 0)


def show(fault: Fault, outcome: Outcome) -> None:
    """Print one row; of its log lines, the first and the last about attempts."""
    answer = outcome.answer
    lines = [line for line in outcome.messages if line.startswith(("Attempt", "Retrying", "Giving up"))]
    both = f"{lines[0]} ... {lines[-1]}" if len(lines) > 1 else "".join(lines)
    say(
        ROW,
        fault.name,
        answer.status,
        answer.json.get("error", "-"),
        outcome.seen,
        answer.headers.get("x-llm-attempts", "-"),
        f"{answer.seconds:.2f}",
        both,
    )


def say(row: str, *values: object) -> None:
    """Print a line at once."""
    sys.stdout.write(row.format(*values))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
