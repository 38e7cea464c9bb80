"""Writes the names and types of the settings to the chart's schema: ``python -m deploy.chart_schema``.

The rest of `deploy/helm/values.schema.json` is written by hand; two definitions in it come from here.
"""

import json
from pathlib import Path
from typing import Any, Final

from service.config.settings import PASSED_THROUGH, Settings

SCHEMA: Final = Path(__file__).with_name("helm") / "values.schema.json"

SECRET: Final = frozenset({"MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "OTEL_EXPORTER_OTLP_HEADERS"})
"""Variables of the SDKs that hold secrets; of the service's own settings, the type says it."""

USED_BY_THE_CHART: Final = frozenset(
    {
        *("HOST", "PORT", "SPOOL_PATH", "SHUTDOWN_TIMEOUT_S", "SHUTDOWN_GRACE_S", "STREAM_TIMEOUT_S"),
        *("MAX_UPLOAD_BYTES", "ENVIRONMENT", "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"),
    }
)
"""Settings whose values the templates read, so that they cannot stand in a Secret."""

CHANGED: Final[dict[str, dict[str, Any]]] = {
    # The container may open no lower port, and the Service must know it.
    "PORT": {"minimum": 1024},
    # Below the volume: the volume itself can be written to by its group, which the service refuses.
    "SPOOL_PATH": {"pattern": "^/app/data/[^/]"},
    # A number, which keeps its limits, or a word.
    "WORKERS": {"type": ["integer", "string"], "pattern": "^auto$"},
}

_KEPT: Final = frozenset(
    {"type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength"}
)


def main() -> None:
    """Bring the file up to date."""
    SCHEMA.write_text(with_settings(SCHEMA.read_text("utf-8")), "utf-8")


def with_settings(text: str) -> str:
    """Return the schema with the definitions of the settings as the service has them now."""
    schema = json.loads(text)
    schema["definitions"] |= {"settings": plain_settings(), "secretSettings": secret_settings()}
    return json.dumps(schema, indent=2) + "\n"


def plain_settings() -> dict[str, Any]:
    """Return the schema of `settings`: every setting that is not a secret, with its type and its limits."""
    fields = Settings.model_json_schema()["properties"]
    found = {name.upper(): _plain(name.upper(), field) for name, field in fields.items()}
    found |= {name: {"type": ["string", "integer"]} for name in PASSED_THROUGH}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: found[name] for name in sorted(found.keys() - secret_names())},
    }


def secret_settings() -> dict[str, Any]:
    """Return the schema of `secretSettings`: any setting that the chart itself does not read."""
    names = {name.upper() for name in Settings.model_fields} | set(PASSED_THROUGH)
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: {"$ref": "#/definitions/secretKey"} for name in sorted(names - USED_BY_THE_CHART)
        },
    }


def secret_names() -> set[str]:
    """Return the settings that hold secrets, which `settings` refuses."""
    fields = Settings.model_json_schema()["properties"]
    return {name.upper() for name, field in fields.items() if field.get("writeOnly")} | SECRET


def _plain(name: str, field: dict[str, Any]) -> dict[str, Any]:
    if "anyOf" in field:
        (field,) = (one for one in field["anyOf"] if one["type"] != "null")
    if field["type"] == "array":
        # Separated by commas.
        field = {"type": "string"}
    found = {key: value for key, value in field.items() if key in _KEPT} | CHANGED.get(name, {})
    if name.endswith(("_URL", "_URI", "_ENDPOINT")):
        # No user name and password.
        found["pattern"] = "^[^@]*$"
    return found


if __name__ == "__main__":
    main()
