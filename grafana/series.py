"""The Prometheus names of OpenTelemetry metrics, and selectors over them.

A selector takes a declared metric and accepts only the attributes and values of its declaration. A metric
that is renamed or removed in `service/telemetry/names.py` therefore stops the generation of the dashboards,
instead of leaving an empty panel.
"""

import re
from collections.abc import Mapping
from typing import Final

from service.telemetry.names import Metric

SERVICE: Final = 'service_name=~"$service"'
"""The service selected on the dashboard; this leaves out the collector's own metrics."""

FAILED: Final = '!=""'
"""The matcher of ``error_type`` for any error."""

RESOURCE_LABELS: Final = ("service_name", "service_version", "deployment_environment_name", "job", "instance")
"""The labels that Prometheus adds to every series from OTLP (otel/prometheus.yaml)."""

_UNIT_SUFFIXES: Final = {"s": "_seconds", "By": "_bytes", "USD": "_USD", "1": "_ratio"}
_ANNOTATION: Final = re.compile(r"\{.*\}")
_COMPARISONS: Final = ("=~", "!~", "!=", "=")


def label(attribute: str) -> str:
    """Return the label name of an attribute."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", attribute)


def base(metric: Metric) -> str:
    """Return a metric's Prometheus name without the suffix of its kind."""
    unit = "" if _ANNOTATION.fullmatch(metric.unit) else _UNIT_SUFFIXES[metric.unit]
    # Prometheus adds the suffix of the unit 1 to gauges only.
    if unit == "_ratio" and metric.kind != "gauge":
        unit = ""
    return label(metric.name) + unit


def series_of(metric: Metric) -> tuple[str, ...]:
    """Return the names of all series of a metric."""
    name = base(metric)
    if metric.kind == "counter":
        return (f"{name}_total",)
    if metric.kind == "histogram":
        return (f"{name}_bucket", f"{name}_count", f"{name}_sum")
    return (name,)


def value(metric: Metric, **matchers: str) -> str:
    """Return a selector of a counter's or gauge's series."""
    if metric.kind == "histogram":
        raise ValueError(f"{metric.name} is a histogram: select its buckets, count or sum")
    return _selector(series_of(metric)[0], metric, matchers)


def bucket(metric: Metric, **matchers: str) -> str:
    """Return a selector of a histogram's buckets."""
    return _selector(_histogram(metric) + "_bucket", metric, matchers)


def count(metric: Metric, **matchers: str) -> str:
    """Return a selector of a histogram's number of values."""
    return _selector(_histogram(metric) + "_count", metric, matchers)


def total(metric: Metric, **matchers: str) -> str:
    """Return a selector of a histogram's sum of values."""
    return _selector(_histogram(metric) + "_sum", metric, matchers)


def by(metric: Metric, *attributes: str) -> str:
    """Return the labels of declared attributes, for a `by (…)`."""
    for attribute in attributes:
        if attribute not in metric.attributes:
            raise LookupError(f"{metric.name} has no attribute {attribute}")
    return ", ".join(label(attribute) for attribute in attributes)


def _histogram(metric: Metric) -> str:
    if metric.kind != "histogram":
        raise ValueError(f"{metric.name} is not a histogram")
    return base(metric)


def _selector(series: str, metric: Metric, matchers: Mapping[str, str]) -> str:
    """Return a selector; matchers look like ``error_type='!=""'`` or, for equality, ``outcome="error"``."""
    parts = [SERVICE]
    attributes = {label(attribute): allowed for attribute, allowed in metric.attributes.items()}
    for name, written in matchers.items():
        if name not in attributes and name != "le":
            raise LookupError(f"{metric.name} has no attribute that becomes the label {name}")
        comparison = next((sign for sign in _COMPARISONS if written.startswith(sign)), None)
        allowed = attributes.get(name, "")
        if comparison is None:
            if not isinstance(allowed, str) and written not in allowed:
                raise LookupError(f"{written} is not a value of {name} on {metric.name}: {allowed}")
            parts.append(f'{name}="{written}"')
        else:
            parts.append(f"{name}{written}")
    return f"{series}{{{', '.join(parts)}}}"
