"""The rules' own unit tests pass, and fail when any number of an alert is another."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from deploy.backends import BINARIES, OTEL

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

ALERTS = (OTEL / "rules/alerts.yaml").read_text(encoding="utf-8")
TESTS = sorted(path.name for path in (OTEL / "rules/tests").glob("*.yaml"))
NUMBER = re.compile(
    r"(?P<before>> |== |\[|for: |quantile\()(?P<number>\d+(?:\.\d+)?)[smhd]?"
    r"(?: \* (?P<budget>[\d.]+))?"
)
"""A threshold, with its factor and budget; a window; a duration."""


def promtool(folder: Path, *names: str, run: str = "") -> subprocess.CompletedProcess[str]:
    """Run the unit tests of the rules in a folder; only these groups, if any are named."""
    chosen = [f"--run={run}"] if run else []
    files = [str(folder / "tests" / name) for name in names]
    return subprocess.run(
        [str(BINARIES / "promtool"), "test", "rules", *chosen, *files],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_rules_pass_their_tests() -> None:
    done = promtool(OTEL / "rules", *TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


def mutations() -> Iterator[tuple[str, str]]:
    """Each number of an alert changed, up and down: what was changed, and the whole text."""
    offset = ALERTS.index("groups:")
    alert = ""
    for line in re.finditer(r".*\n", ALERTS[offset:]):
        text = line[0]
        if named := re.match(r"\s*- alert: (\w+)", text):
            alert = named[1]
        if "summary:" in text or text.strip().startswith("#") or not alert:
            continue
        for found in NUMBER.finditer(text):
            for group in ("number", "budget"):
                if found[group] is None:
                    continue
                for changed in _others(found[group], found["before"]):
                    start = offset + line.start() + found.start(group)
                    end = offset + line.start() + found.end(group)
                    what = f"{alert}: {found[0].strip()} with {changed} for {found[group]}"
                    yield what, ALERTS[:start] + changed + ALERTS[end:]


def _others(number: str, before: str) -> list[str]:
    value = float(number)
    if before == "quantile(":
        return ["0.95"]
    if before == "== ":
        return [f"{1 - value:g}"]
    if value == 0:
        return ["20"]
    return (
        [f"{value * 2:g}", f"{value / 2:g}"]
        if before in {"[", "for: "}
        else [
            f"{value * 1.05:g}",
            f"{value * 0.95:g}",
        ]
    )


def test_every_number_of_every_alert_is_changed() -> None:
    changed = [what for what, _ in mutations()]
    assert {what.split(":")[0] for what in changed} == set(re.findall(r"- alert: (\w+)", ALERTS))
    assert len(changed) > 100


def groups_of(alert: str) -> dict[str, list[str]]:
    """The groups of tests that are about an alert, by file."""
    found: dict[str, list[str]] = {}
    for name in TESTS:
        for group in yaml.safe_load((OTEL / "rules/tests" / name).read_text(encoding="utf-8"))["tests"]:
            if any(test["alertname"] == alert for test in group.get("alert_rule_test", ())):
                found.setdefault(name, []).append(group["name"])
    return found


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    alerts = set(re.findall(r"- alert: (\w+)", ALERTS))
    about = {alert: groups_of(alert) for alert in alerts}

    def survives(mutation: tuple[int, tuple[str, str]]) -> str:
        number, (what, text) = mutation
        folder = tmp_path / str(number)
        shutil.copytree(OTEL / "rules", folder)
        (folder / "alerts.yaml").write_text(text, encoding="utf-8")
        # Only what is about the alert: all of it, for each of the numbers, would take minutes.
        ((name, groups),) = about[what.split(":")[0]].items()
        done = promtool(folder, name, run="|".join(f"^{re.escape(group)}$" for group in groups))
        return "" if done.returncode else what

    with ThreadPoolExecutor(2) as two:
        survivors = [what for what in two.map(survives, enumerate(mutations())) if what]
    assert not survivors
