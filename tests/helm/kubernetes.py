"""Whether an API server would accept an object: its schema, with unknown fields refused.

The schemas are those of Kubernetes, of the Gateway API and of KEDA; `make helm-test` gets them.
"""

import json
from functools import cache
from typing import Any, Final

import jsonschema_rs
import yaml

from deploy.backends import ROOT

SCHEMAS: Final = ROOT / ".stack/kubernetes"
OBJECT_META: Final = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"

Schema = dict[str, Any]


def faults(found: dict[str, Any]) -> list[str]:
    """Return what is wrong with an object; empty where it is valid.

    Raises:
        LookupError: No schema is for its kind and version.
    """
    return [
        f"{'/'.join(map(str, one.instance_path))}: {one.message}"
        for one in _validator(found).iter_errors(found)
    ]


def _validator(found: dict[str, Any]) -> jsonschema_rs.Draft7Validator:
    return _of_kind(found["apiVersion"], found["kind"])


@cache
def _of_kind(version: str, kind: str) -> jsonschema_rs.Draft7Validator:
    definitions = _definitions()
    group, _, number = version.rpartition("/")
    wanted = {"group": group, "kind": kind, "version": number}
    for name, schema in definitions.items():
        if wanted in schema.get("x-kubernetes-group-version-kind", []):
            return jsonschema_rs.Draft7Validator(
                {"$ref": f"#/definitions/{name}", "definitions": definitions}, validate_formats=False
            )
    raise LookupError(f"no schema for {version} {kind}")


@cache
def _definitions() -> dict[str, Schema]:
    kubernetes: dict[str, Schema] = json.loads((SCHEMAS / "swagger.json").read_text("utf-8"))["definitions"]
    found = {name: _strict(schema) for name, schema in kubernetes.items()}
    for path in sorted(SCHEMAS.glob("*.yaml")):
        definition = yaml.load(path.read_text("utf-8"), Loader=yaml.CSafeLoader)["spec"]
        for version in definition["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"$ref": f"#/definitions/{OBJECT_META}"}
            kind = {
                "group": definition["group"],
                "kind": definition["names"]["kind"],
                "version": version["name"],
            }
            schema["x-kubernetes-group-version-kind"] = [kind]
            found[f"{definition['names']['plural']}.{definition['group']}.{version['name']}"] = schema
    return found


def _strict(schema: Any) -> Any:
    """Return a schema that refuses fields it does not name, and takes numbers and texts where both are."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("format") == "int-or-string" or schema.get("x-kubernetes-int-or-string") is True:
        return {"type": ["integer", "string"]}
    # A field may be called like a keyword, so the properties are looked at by themselves.
    found = {key: _strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        found["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
        if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
    return found
