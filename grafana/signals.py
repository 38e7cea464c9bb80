"""The list of all metrics, spans and events in `otel/README.md`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from grafana.series import series_of
from grafana.standard import STANDARD
from service.telemetry import names
from service.telemetry.names import Metric

README: Final = Path(__file__).resolve().parents[1] / "otel/README.md"
_BEGIN: Final = "<!-- signals -->\n"
_END: Final = "<!-- /signals -->\n"


def table() -> str:
    """Return the list in Markdown."""
    lines = ["| metric | in Prometheus | kind, unit | attributes | what |", "|---|---|---|---|---|"]
    lines += [_row(metric) for metric in (*names.METRICS, *STANDARD)]
    spans = [value for name, value in vars(names).items() if name.startswith("SPAN_")]
    lines += [
        "",
        f"The service's own spans: {_list(spans)}. All others have the names of the semantic conventions.",
        "",
    ]
    lines += [f"Events, each of them a log line, an OTLP log record and a span event: {_list(names.EVENTS)}."]
    return "\n".join(lines) + "\n"


def _list(values: Iterable[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _row(metric: Metric) -> str:
    attributes = "; ".join(_attribute(*pair) for pair in metric.attributes.items()) or "none"
    series = series_of(metric)[0].removesuffix("_bucket")
    kind = metric.kind.replace("_", "-")
    return f"| `{metric.name}` | `{series}` | {kind}, `{metric.unit}` | {attributes} | {metric.description} |"


def _attribute(name: str, values: tuple[str, ...] | str) -> str:
    if name == "error.type" and not isinstance(values, str):
        return f"`{name}` (the names in `service/errors.py`)"
    if isinstance(values, str):
        return f"`{name}`" if values == "any" else f"`{name}` ({values})"
    return f"`{name}` ({', '.join(values)})"


def with_table(text: str) -> str:
    """Return the README with the list between its markers replaced."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return before + _BEGIN + table() + _END + after
