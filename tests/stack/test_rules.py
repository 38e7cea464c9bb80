"""The rules' own unit tests pass, and fail when any number of an alert is another."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.backends import BINARIES, OTEL

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

ALERTS = (OTEL / "rules/alerts.yaml").read_text(encoding="utf-8")
TESTS = sorted(path.name for path in (OTEL / "rules/tests").glob("*.yaml"))
NUMBER = re.compile(
    r"(?P<before>> |== |\[|for: |quantile\()(?P<number>\d+(?:\.\d+)?)[smhd]?"
    r"(?: \* (?P<budget>[\d.]+))?"
)
"""A threshold, with its factor and budget; a window; a duration."""


def promtool(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Run the unit tests of the rules in a folder."""
    return subprocess.run(
        [str(BINARIES / "promtool"), "test", "rules", *(str(folder / "tests" / name) for name in names)],
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


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    texts = {name: (OTEL / "rules/tests" / name).read_text(encoding="utf-8") for name in TESTS}

    def survives(mutation: tuple[int, tuple[str, str]]) -> str:
        number, (what, text) = mutation
        folder = tmp_path / str(number)
        shutil.copytree(OTEL / "rules", folder)
        (folder / "alerts.yaml").write_text(text, encoding="utf-8")
        alert = what.split(":")[0]
        done = promtool(folder, *(name for name in TESTS if f"alertname: {alert}" in texts[name]))
        return "" if done.returncode else what

    with ThreadPoolExecutor(2) as two:
        survivors = [what for what in two.map(survives, enumerate(mutations())) if what]
    assert not survivors
