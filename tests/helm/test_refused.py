"""Values that must not be rendered, and what Helm says about them."""

from typing import Any

import pytest
import yaml

from tests.helm.chart import RELEASE, VALUES, RefusedError, helm, merged, without

pytestmark = pytest.mark.stack

PRODUCTION = VALUES["production"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # Names that are not there
        ({"replicas": 3}, "replicas"),
        ({"settings": {"LLM_TIMEOUT": 3}}, "LLM_TIMEOUT"),
        ({"secretSettings": {"JWT_SECRET": {"secret": "a", "key": "b"}}}, "JWT_SECRET"),
        ({"service": {"ports": 80}}, "ports"),
        ({"image": {"sha": "a"}}, "sha"),
        ({"networkPolicy": {"egress": {"litellm": {"from": []}}}}, "from"),
        ({"env": {"A": "b"}}, "env"),
        # Secrets in the open
        ({"settings": {"JWT_SECRET_KEY": "a" * 64}}, "JWT_SECRET_KEY"),
        ({"settings": {"DATABASE_URL": "postgresql://a:b@c/d"}}, "DATABASE_URL"),
        ({"settings": {"QDRANT_API_KEY": "a"}}, "QDRANT_API_KEY"),
        ({"settings": {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=a"}}, "OTEL_EXPORTER_OTLP_HEADERS"),
        ({"settings": {"MLFLOW_TRACKING_PASSWORD": "a"}}, "MLFLOW_TRACKING_PASSWORD"),
        ({"settings": {"VALKEY_URL": "valkey://:a@b:6379"}}, "VALKEY_URL"),
        ({"settings": {"MLFLOW_TRACKING_URI": "http://a:b@c:5000"}}, "MLFLOW_TRACKING_URI"),
        ({"secretSettings": {"LITELLM_API_KEY": "sk-a"}}, "LITELLM_API_KEY"),
        ({"secretSettings": {"LITELLM_API_KEY": {"secret": "a", "key": "b", "value": "c"}}}, "value"),
        ({"secretSettings": {"SHUTDOWN_TIMEOUT_S": {"secret": "a", "key": "b"}}}, "SHUTDOWN_TIMEOUT_S"),
        # Types and limits
        ({"replicaCount": "3"}, "replicaCount"),
        ({"settings": {"RETRY_MAX": "3"}}, "RETRY_MAX"),
        ({"settings": {"RETRY_MAX": 11}}, "RETRY_MAX"),
        ({"settings": {"CACHE_SCOPE": "all"}}, "CACHE_SCOPE"),
        ({"settings": {"CACHE_ENABLED": "true"}}, "CACHE_ENABLED"),
        ({"settings": {"PORT": 80}}, "PORT"),
        ({"settings": {"SPOOL_PATH": "/app/data"}}, "SPOOL_PATH"),
        ({"settings": {"SPOOL_PATH": "/data/spool"}}, "SPOOL_PATH"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"image": {"digest": "sha256:a"}}, "digest"),
        ({"persistence": {"accessMode": "ReadWriteMany"}}, "accessMode"),
        ({"persistence": {"size": "much"}}, "size"),
        ({"networkPolicy": {"ingress": {"from": [{}]}}}, "from"),
        ({"networkPolicy": {"egress": {"litellm": {"to": []}}}}, "to"),
        ({"networkPolicy": {"egress": {"litellm": {"ports": []}}}}, "ports"),
        ({"resources": {"limits": {"memory": "-1"}}}, "memory"),
        ({"podDisruptionBudget": {"maxUnavailable": 0}}, "maxUnavailable"),
        ({"topologySpread": {"whenUnsatisfiable": "Never"}}, "whenUnsatisfiable"),
    ],
    ids=str,
)
def test_the_schema_refuses(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=said) as caught:
        helm("template", RELEASE, values=merged(PRODUCTION, change))
    assert "don't meet the specifications of the schema" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "change", "said"),
    [
        ("default", {"replicaCount": 2}, "More than one pod needs DATABASE_URL"),
        ("default", {"secretSettings": {"JWT_SECRET_KEY": None}}, "secretSettings needs JWT_SECRET_KEY"),
        (
            "default",
            {"secretSettings": {"AUTH_USER_PASSWORD": None}},
            "secretSettings needs AUTH_USER_PASSWORD",
        ),
        (
            "default",
            {
                "settings": {"OIDC_AUDIENCE": "a"},
                "secretSettings": {"OIDC_AUDIENCE": {"secret": "a", "key": "b"}},
            },
            "OIDC_AUDIENCE is in settings and in secretSettings",
        ),
        ("production", {"networkPolicy": {"ingress": {"from": []}}}, "networkPolicy.ingress.from must name"),
        ("small", {"networkPolicy": {"ingress": {"from": []}}}, "networkPolicy.ingress.from must name"),
        ("small", {"ingress": {"hosts": []}}, "ingress.hosts must name"),
        ("production", {"gateway": {"parentRefs": []}}, "gateway.parentRefs must name"),
        ("production", {"autoscaling": {"prometheus": {"serverAddress": ""}}}, "serverAddress must be"),
        ("production", {"autoscaling": {"minReplicas": 11}}, "minReplicas is more than maxReplicas"),
        (
            "default",
            {"persistence": {"enabled": False}, "replay": {"ordinals": [1]}},
            "replay.ordinals needs",
        ),
    ],
    ids=str,
)
def test_the_chart_refuses_what_contradicts_itself(values: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        helm("template", RELEASE, values=merged(VALUES[values], change))


@pytest.mark.parametrize(
    "path", [("secretSettings", "DATABASE_URL"), ("settings", "QDRANT_URL")], ids="/".join
)
def test_several_pods_need_stores_that_they_share(path: tuple[str, str]) -> None:
    with pytest.raises(RefusedError, match=f"More than one pod needs {path[1]}"):
        helm("template", RELEASE, values=without(PRODUCTION, *path))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "networkPolicy.ingress.from is empty"),
        ({"persistence": {"enabled": False}}, "lost with their pod"),
    ],
    ids=str,
)
def test_the_notes_say_what_the_values_lack(change: dict[str, Any], text: str) -> None:
    # `helm template` prints no notes, so they are rendered as an object.
    shown = helm("install", RELEASE, "--dry-run=client", values=change)
    assert text in shown
    assert list(yaml.safe_load_all(shown.partition("MANIFEST:")[2].partition("NOTES:")[0]))
