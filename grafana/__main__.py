"""`python -m grafana` writes the dashboards, the registry and the list of signals; tests compare them."""

import json
import sys
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana import signals
from grafana.dependencies import dependencies
from grafana.llm import llm
from grafana.panels import Board
from grafana.registry import documents
from grafana.service import service
from grafana.spending import spending
from grafana.telemetry import telemetry

FOLDER: Final = Path(__file__).resolve().parent / "dashboards"
BOARDS: Final[tuple[Board, ...]] = (service, dependencies, llm, spending, telemetry)


def generated() -> dict[str, str]:
    """Return the file name and the content of each dashboard."""
    return {
        f"{board.__name__}.json": json.dumps(board(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for board in BOARDS
    }


def main() -> int:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in generated().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    documents.FOLDER.mkdir(exist_ok=True)
    for name, text in documents.generated().items():
        (documents.FOLDER / name).write_text(text, encoding="utf-8")
    signals.README.write_text(
        signals.with_table(signals.README.read_text(encoding="utf-8")), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
