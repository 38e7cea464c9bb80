"""Declares what every signal means, and makes the semantic-convention registry `otel/registry/` of it.

`signals.py` has the spans, events and groups; `attributes.py` has the attributes, each with the places where
it may stand. The metrics are those of `service/telemetry/names.py` and `grafana/standard.py`. A new signal or
attribute is one entry there; `make dashboards` writes it to the registry and to `otel/README.md`.
"""
