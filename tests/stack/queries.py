"""Every query that Grafana and Prometheus would run: read from the files that they are given."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml

from deploy.backends import OTEL, ROOT

WINDOW_S: Final = 300
VARIABLES: Final = {"$__rate_interval": "5m", "$__range": "5m", "$service": ".+"}
"""What Grafana puts in: here, windows in which the whole run lies, and every service."""


@dataclass(frozen=True)
class Query:
    """One query: where it stands, its text, and the kind of its datasource."""

    where: str
    expr: str
    datasource: str = "prometheus"

    @property
    def filled(self) -> str:
        """The text with Grafana's variables replaced."""
        text = self.expr
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        return text


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel of a dashboard, those in rows too."""
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", [])
        else:
            yield panel


def boards() -> list[dict[str, Any]]:
    """The dashboards as they are committed."""
    return [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "grafana/dashboards").glob("*.json"))
    ]


def of_panels() -> list[Query]:
    """The queries of all panels."""
    return [
        Query(
            f"{board['uid'].removeprefix('llmops-')}: {panel['title']} {target['refId']}",
            next(target[key] for key in ("expr", "rawSql", "query") if key in target),
            target["datasource"]["type"],
        )
        for board in boards()
        for panel in panels(board)
        for target in panel["targets"]
    ]


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules of a kind, ``record`` or ``alert``."""
    return [
        rule
        for path in sorted((OTEL / "rules").glob("*.yaml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
        if kind in rule
    ]


def of_rules(kind: str) -> list[Query]:
    """The expressions of all rules of a kind."""
    return [Query(rule[kind], rule["expr"]) for rule in rules(kind)]
