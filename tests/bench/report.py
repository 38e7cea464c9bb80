"""REPLICAS.md: a part for each command that writes to it, with the machine on which it ran."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.bench.__main__ import machine

FILE: Final = Path(__file__).with_name("REPLICAS.md")
PARTS: Final = ("Proofs", "Capacity")


def write_section(part: str, lines: Sequence[str], file: Path = FILE) -> None:
    """Replace one part, and leave the others as they are."""
    text = file.read_text() if file.exists() else ""
    found = {name: text.partition(f"## {name}\n")[2].partition("\n## ")[0].strip() for name in PARTS}
    found[part] = "\n".join([f"{machine()}.", "", *lines]).strip()
    parts = [f"## {name}\n\n{found[name]}\n" for name in PARTS if found[name]]
    file.write_text("\n".join(["# Replicas, as `make replicas` saw them\n", *parts]))
