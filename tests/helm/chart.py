"""Renders the chart with the real Helm, and looks at the objects."""

import subprocess
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from typing import Any, Final

import yaml

from deploy.backends import BINARIES, ROOT

CHART: Final = ROOT / "deploy/helm"
EXAMPLES: Final = CHART / "examples"
RELEASE: Final = "llmops"
NAME: Final = "llmops-llmops-api"

VALUES: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "production": yaml.safe_load((EXAMPLES / "production.yaml").read_text("utf-8")),
    "small": yaml.safe_load((EXAMPLES / "small.yaml").read_text("utf-8")),
    "everything": {
        "replicaCount": 3,
        "fullnameOverride": "everything-that-the-chart-can-do",
        "image": {"digest": f"sha256:{'a' * 64}", "pullSecrets": ["registry"]},
        "settings": {
            "QDRANT_URL": "http://qdrant:6333",
            "MAX_UPLOAD_BYTES": 2_147_483_648,
            "RETRY_JITTER": 0.5,
            "CACHE_SEMANTIC": False,
            "OTEL_RESOURCE_ATTRIBUTES": "team=platform,",
        },
        "secretSettings": {"DATABASE_URL": {"secret": "database", "key": "url"}},
        "service": {"type": "LoadBalancer", "annotations": {"example.org/zone": "private"}},
        "ingress": {
            "enabled": True,
            "controller": "other",
            "className": "haproxy",
            "annotations": {"haproxy.org/timeout-server": "610s"},
            "hosts": ["llm.example.org"],
            "tlsSecret": "llm",
        },
        "gateway": {
            "enabled": True,
            "parentRefs": [{"name": "public"}],
            "annotations": {"a.example.org/b": "c"},
        },
        "replay": {"ordinals": [3, 4]},
        "preStopSleepS": 7,
        "serviceAccount": {"annotations": {"example.org/role": "llm"}},
        "podDisruptionBudget": {"maxUnavailable": "25%"},
        "networkPolicy": {
            "ingress": {"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]},
            "egress": {"oidc": {"to": [{"ipBlock": {"cidr": "192.0.2.1/32"}}], "ports": [{"port": 443}]}},
        },
        "podAnnotations": {"example.org/a": "b"},
        "podLabels": {"example.org/c": "d"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "llm", "operator": "Exists", "effect": "NoSchedule"}],
        "priorityClassName": "high",
    },
    "nothing": {
        "persistence": {"enabled": False},
        "migration": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "topologySpread": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "serviceAccount": {"create": False},
    },
}
"""Sets of values that must render valid objects: the default, the examples, and what a toggle can do."""

Object = dict[str, Any]


class RefusedError(Exception):
    """Helm refused the values; the message is its own."""


def helm(command: str, *arguments: str, values: dict[str, Any]) -> str:
    """Run a command of Helm over the chart and return what it prints; raises ``RefusedError``."""
    done = subprocess.run(
        [str(BINARIES / "helm"), command, *arguments, str(CHART), "--values", "-"],
        input=yaml.safe_dump(values),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RefusedError(done.stdout + done.stderr)
    return done.stdout


def rendered(values: dict[str, Any]) -> list[Object]:
    """Return the objects of `helm template`."""
    return [found for found in yaml.load_all(_template(yaml.safe_dump(values)), yaml.CSafeLoader) if found]


@cache
def _template(values: str) -> str:
    return helm("template", RELEASE, "--namespace", "llm", values=yaml.safe_load(values))


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return values with other values over them, as Helm merges them."""
    found = deepcopy(values)
    for name, change in changes.items():
        inner = found.get(name)
        found[name] = (
            merged(inner, change) if isinstance(change, dict) and isinstance(inner, dict) else change
        )
    return found


def without(values: dict[str, Any], *path: str) -> dict[str, Any]:
    """Return values without one that the chart has no default for; null removes one that it has."""
    found = inner = deepcopy(values)
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return found


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    """Return the objects of a kind."""
    return [one for one in objects if one["kind"] == kind]


def only(objects: list[Object], kind: str, name: str = NAME) -> Object:
    """Return the one object of a kind and name."""
    (found,) = (one for one in of_kind(objects, kind) if one["metadata"]["name"] == name)
    return found


def pods(objects: list[Object]) -> Iterator[Object]:
    """Yield the pod, or the template of pods, of each object that has one."""
    for one in objects:
        if one["kind"] == "Pod":
            yield one
        elif one["kind"] in {"StatefulSet", "Job"}:
            yield one["spec"]["template"]


def container(objects: list[Object]) -> Object:
    """Return the container of the API."""
    (found,) = of_kind(objects, "StatefulSet")[0]["spec"]["template"]["spec"]["containers"]
    return dict(found)


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector takes these labels."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    expressions = selector.get("matchExpressions", [])
    assert {one["operator"] for one in expressions} <= {"In"}
    return all(labels.get(one["key"]) in one["values"] for one in expressions)
