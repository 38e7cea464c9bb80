"""Links to the pages of Grafana and MLflow about one request, where their addresses are configured."""

import json
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from service.config.settings import Settings
from service.explain.report import LinkReport

AROUND_MS: Final = 3_600_000
"""How far from the request's time Grafana looks."""


@dataclass(frozen=True, slots=True)
class Links:
    """Makes the links.

    Args:
        grafana_url: Grafana's address for people; empty without one.
        mlflow_url: That of MLflow's pages.
        service_name: The service's name in Loki.
    """

    grafana_url: str = ""
    mlflow_url: str = ""
    service_name: str = ""

    @classmethod
    def from_settings(cls, settings: Settings) -> "Links":
        """The addresses that are configured."""
        return cls(
            settings.grafana_url.rstrip("/"), settings.mlflow_ui_url.rstrip("/"), settings.otel_service_name
        )

    def of(
        self, trace_id: str, record_id: str | None, started_ns: int, experiment_id: str | None
    ) -> LinkReport:
        """The links of one request.

        Args:
            trace_id: Its trace.
            record_id: Its call's record, without ``tr-``.
            started_ns: When it began, in Unix time.
            experiment_id: MLflow's id of the experiment; None where it is not known.
        """
        trace = logs = record = None
        if self.grafana_url:
            tempo = {"queryType": "traceql", "query": trace_id}
            name = self.service_name.replace("\\", "\\\\").replace('"', '\\"')
            loki = {"expr": f'{{service_name="{name}"}} | trace_id="{trace_id}"'}
            trace = self._explore("tempo", tempo, started_ns)
            logs = self._explore("loki", loki, started_ns)
        if self.mlflow_url and record_id is not None and experiment_id is not None:
            where = quote(experiment_id, safe="")
            record = f"{self.mlflow_url}/#/experiments/{where}/traces?selectedEvaluationId=tr-{record_id}"
        return LinkReport(trace=trace, logs=logs, record=record)

    def _explore(self, source: str, query: dict[str, Any], started_ns: int) -> str:
        """Grafana's page for a query; the data sources have these names in ``grafana/provisioning``."""
        at_ms = started_ns // 1_000_000
        queries = [{"refId": "A", "datasource": {"type": source, "uid": source}, **query}]
        span = {"from": str(at_ms - AROUND_MS), "to": str(at_ms + AROUND_MS)}
        panes = {"a": {"datasource": source, "queries": queries, "range": span}}
        text = quote(json.dumps(panes, separators=(",", ":")), safe="")
        return f"{self.grafana_url}/explore?schemaVersion=1&orgId=1&panes={text}"
