"""What the chart promises: how pods start, stop, spread and scale, and whom they reach."""

import json
import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from grafana.series import value
from service.telemetry import names
from tests.helm.chart import (
    CHART,
    NAME,
    VALUES,
    Object,
    container,
    merged,
    of_kind,
    only,
    pods,
    rendered,
    selects,
    without,
)

pytestmark = pytest.mark.stack

DEFAULTS: Object = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
DEPENDENCIES = {"dns", "litellm", "qdrant", "valkey", "postgresql", "mlflow", "collector"}
STOP_STEPS_S = 5
"""The whole stop ends within this time of the drain (service/config/lifespan.py)."""


def settings_of(objects: list[Object], name: str = NAME) -> dict[str, str]:
    found: dict[str, str] = only(objects, "ConfigMap", name)["data"]
    return found


def template(objects: list[Object]) -> Object:
    found: Object = of_kind(objects, "StatefulSet")[0]["spec"]["template"]
    return found


# ---- Records ----


def test_the_spool_is_on_a_volume_that_outlives_the_pod_its_ordinal_and_the_release() -> None:
    objects = rendered(VALUES["production"])
    spec = only(objects, "StatefulSet")["spec"]
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    (claim,) = spec["volumeClaimTemplates"]
    (mounted,) = (
        one["mountPath"]
        for one in container(objects)["volumeMounts"]
        if one["name"] == claim["metadata"]["name"]
    )
    assert settings_of(objects)["SPOOL_PATH"].startswith(f"{mounted}/")
    # A claim for each ordinal: nobody else can hold the locks of its spool.
    assert claim["spec"]["accessModes"] in (["ReadWriteOnce"], ["ReadWriteOncePod"])


def test_a_second_mount_leaves_the_mode_of_the_spool_alone() -> None:
    for pod in pods(rendered(VALUES["everything"])):
        assert pod["spec"]["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


def test_without_persistence_there_is_no_claim_and_the_folder_is_still_there() -> None:
    objects = rendered({"persistence": {"enabled": False}})
    assert "volumeClaimTemplates" not in only(objects, "StatefulSet")["spec"]
    volumes = {one["name"]: one for one in template(objects)["spec"]["volumes"]}
    assert volumes.keys() == {one["name"] for one in container(objects)["volumeMounts"]}
    assert volumes["data"] == {"name": "data", "emptyDir": {"sizeLimit": "2Gi"}}


def test_only_the_spool_and_the_folder_for_temporary_files_can_be_written_to() -> None:
    written = {
        one["args"][0]: [mount["mountPath"] for mount in one.get("volumeMounts", [])]
        for pod in pods(rendered(VALUES["everything"]))
        for one in pod["spec"]["containers"]
    }
    temporary, spool = "/tmp", "/app/data"  # noqa: S108 - the container's own
    assert written == {
        "serve": [spool, temporary],
        "replay": [spool, temporary],
        "migrate": [temporary],
        "everything-that-the-chart-can-do": [],  # the test of the release
    }


def test_what_a_pod_left_that_was_scaled_away_is_sent_by_a_job_on_its_volume() -> None:
    objects = rendered(VALUES["production"] | {"replay": {"ordinals": [3, 4]}})
    jobs = [one for one in of_kind(objects, "Job") if "annotations" not in one["metadata"]]
    (claim,) = only(objects, "StatefulSet")["spec"]["volumeClaimTemplates"]
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for job in jobs
        for volume in job["spec"]["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    # The name that Kubernetes gives the claim of an ordinal.
    assert claims == [f"{claim['metadata']['name']}-{NAME}-{ordinal}" for ordinal in (3, 4)]
    for job in jobs:
        (one,) = job["spec"]["template"]["spec"]["containers"]
        assert one["args"] == ["replay"]
        assert (one["env"], one["envFrom"]) == (container(objects)["env"], container(objects)["envFrom"])


# ---- Start and stop ----


def test_probes_ask_the_routes_that_the_readme_names() -> None:
    api = container(rendered({}))
    readme = (CHART.parent / "README.md").read_text("utf-8")
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        given = api[probe]
        assert given["httpGet"]["port"] == "http"
        told = f"`{probe}` | `{given['httpGet']['path']}`, `periodSeconds: {given['periodSeconds']}`, "
        assert f"| {told}`failureThreshold: {given['failureThreshold']}` |" in readme
        assert "initialDelaySeconds" not in given
        # /health/detailed takes as long as a check.
        assert given["timeoutSeconds"] > 3
    assert api["startupProbe"]["httpGet"]["path"] == api["livenessProbe"]["httpGet"]["path"] == "/health"
    assert api["readinessProbe"]["httpGet"]["path"] == "/health/detailed"


@pytest.mark.parametrize(
    ("timeout_s", "sleep_s"), [(None, 0), (45, 0), (600, 0), (30.5, 7), (3600, 600)], ids=str
)
def test_a_pod_has_time_for_its_whole_stop(timeout_s: float | None, sleep_s: int) -> None:
    objects = rendered({"settings": {"SHUTDOWN_TIMEOUT_S": timeout_s}, "preStopSleepS": sleep_s})
    # Without the setting, the service's own default.
    drain_s = float(settings_of(objects).get("SHUTDOWN_TIMEOUT_S", 30))
    assert template(objects)["spec"]["terminationGracePeriodSeconds"] >= drain_s + sleep_s + STOP_STEPS_S
    stop = container(objects).get("lifecycle")
    assert stop == ({"preStop": {"sleep": {"seconds": sleep_s}}} if sleep_s else None)


def test_the_drain_accepts_calls_until_the_readiness_probe_has_failed_and_lets_them_end() -> None:
    objects = rendered({})
    given, probe = settings_of(objects), container(objects)["readinessProbe"]
    grace_s = float(given["SHUTDOWN_GRACE_S"])
    assert grace_s >= probe["periodSeconds"] * probe["failureThreshold"]
    assert float(given["SHUTDOWN_TIMEOUT_S"]) >= grace_s + 30  # LLM_TIMEOUT_S


def test_pods_are_ready_without_qdrant_and_mlflow() -> None:
    assert settings_of(rendered({}))["HEALTH_REQUIRED"] == "litellm"


def test_a_release_can_be_rolled_back_while_a_pod_is_not_ready() -> None:
    spec = only(rendered({}), "StatefulSet")["spec"]
    assert spec["podManagementPolicy"] == "Parallel"
    assert spec["updateStrategy"] == {"type": "RollingUpdate"}


@pytest.mark.parametrize(
    "change", [{"settings": {"RETRY_MAX": 1}}, {"settings": {"OTEL_RESOURCE_ATTRIBUTES": "a=b"}}], ids=str
)
def test_a_change_of_the_settings_changes_the_pods(change: dict[str, Any]) -> None:
    assert template(rendered(change)) != template(rendered({}))


def test_other_changes_leave_the_pods_alone() -> None:
    changes = {
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "service": {"port": 8080},
    }
    assert template(rendered(changes)) == template(rendered({}))


# ---- Settings and secrets ----


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"MAX_UPLOAD_BYTES": 2_147_483_648}, "2147483648"),
        ({"SPOOL_MAX_BYTES": 1_099_511_627_776}, "1099511627776"),
        ({"RETRY_JITTER": 0.25}, "0.25"),
        ({"CACHE_SEMANTIC": True}, "true"),
        ({"OIDC_USER_CLAIM": "yes"}, "yes"),
        ({"EMBEDDING_MODEL": "a: b # c"}, "a: b # c"),
        ({"OTEL_BSP_SCHEDULE_DELAY": 500}, "500"),
    ],
    ids=str,
)
def test_a_setting_arrives_as_the_service_reads_it(given: dict[str, Any], text: str) -> None:
    (name,) = given
    objects = rendered(merged(VALUES["production"], {"settings": given}))
    assert settings_of(objects)[name] == text
    assert container(objects)["envFrom"] == [{"configMapRef": {"name": NAME}}]
    migrate = only(objects, "Job", f"{NAME}-migrate")["spec"]["template"]["spec"]["containers"][0]
    assert {"name": name, "value": text} in migrate["env"]


SECRETS = {
    "JWT_SECRET_KEY": secrets.token_hex(32),
    "AUTH_ADMIN_PASSWORD": secrets.token_urlsafe(16),
    "AUTH_USER_PASSWORD": secrets.token_urlsafe(16),
    "LITELLM_API_KEY": secrets.token_hex(16),
    "QDRANT_API_KEY": secrets.token_hex(16),
    "DATABASE_URL": "postgresql://llmops:a@llmops-postgres-rw.llm:5432/llmops",
    "VALKEY_URL": "valkey://:a@valkey:6379",
}


@pytest.mark.parametrize("values", ["default", "production", "small", "everything"])
def test_the_service_accepts_the_environment_of_its_container(values: str, tmp_path: Path) -> None:
    objects = rendered(VALUES[values])
    (config,) = of_kind(objects, "ConfigMap")
    env: dict[str, str] = {"PYTHONPATH": str(CHART.parents[1])} | config["data"]
    for entry in container(objects)["env"]:
        env[entry["name"]] = entry.get("value") or SECRETS.get(entry["name"], "of-the-pod")
    done = subprocess.run(
        [sys.executable, "-m", "service", "check"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert [json.loads(line)["message"] for line in done.stdout.splitlines()] == [
        "The configuration is valid"
    ]
    assert done.returncode == 0


def test_the_port_is_one_everywhere() -> None:
    objects = rendered(merged(VALUES["production"], {"settings": {"PORT": 9000}}))
    assert settings_of(objects)["PORT"] == "9000"
    assert [one["containerPort"] for one in container(objects)["ports"]] == [9000]
    assert {
        one["targetPort"] for service in of_kind(objects, "Service") for one in service["spec"]["ports"]
    } == {"http"}
    (rule,) = only(objects, "NetworkPolicy")["spec"]["ingress"]
    assert [one["port"] for one in rule["ports"]] == [9000]


@pytest.mark.parametrize("values", sorted(VALUES))
def test_a_secret_is_a_reference_in_every_container(values: str) -> None:
    given = merged(DEFAULTS, VALUES[values])["secretSettings"]
    for pod in pods(rendered(VALUES[values])):
        for one in pod["spec"]["containers"]:
            env = {entry["name"]: entry for entry in one.get("env", ())}
            if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "test":
                assert env == {}
                continue
            for name, ref in given.items():
                wanted = {"secretKeyRef": {"name": ref["secret"], "key": ref["key"]}}
                assert env[name] == {"name": name, "valueFrom": wanted}


def test_the_resource_names_the_pod_behind_what_the_user_gives() -> None:
    objects = rendered(VALUES["everything"])
    env = {one["name"]: one for one in container(objects)["env"]}
    text = env["OTEL_RESOURCE_ATTRIBUTES"]["value"]

    def field(match: re.Match[str]) -> str:
        found: str = env[match[1]]["valueFrom"]["fieldRef"]["fieldPath"]
        # Kubernetes replaces only what stands before.
        assert list(env).index(match[1]) < list(env).index("OTEL_RESOURCE_ATTRIBUTES")
        return found

    assert re.sub(r"\$\((\w+)\)", field, text).split(",") == [
        "team=platform",
        "k8s.namespace.name=metadata.namespace",
        "k8s.node.name=spec.nodeName",
        "k8s.pod.name=metadata.name",
        "k8s.pod.uid=metadata.uid",
    ]
    assert "OTEL_RESOURCE_ATTRIBUTES" not in settings_of(objects, "everything-that-the-chart-can-do")
    assert container(rendered({}))["env"][4]["value"].startswith("k8s.namespace.name=")


# ---- The database ----


def test_the_database_is_migrated_before_the_pods_change() -> None:
    job = only(rendered(VALUES["production"]), "Job", f"{NAME}-migrate")
    annotations = job["metadata"]["annotations"]
    assert annotations["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
    spec = job["spec"]["template"]["spec"]
    (one,) = spec["containers"]
    assert one["args"] == ["migrate"]
    # Neither is there before the first install.
    assert "envFrom" not in one
    assert "serviceAccountName" not in spec
    assert job["spec"]["activeDeadlineSeconds"] == 300


def test_there_is_no_job_where_there_is_nothing_to_migrate() -> None:
    values = merged(VALUES["production"], {"autoscaling": {"enabled": False}})
    assert len(of_kind(rendered(values), "Job")) == 1
    assert of_kind(rendered(merged(values, {"migration": {"enabled": False}})), "Job") == []
    assert of_kind(rendered(without(values, "secretSettings", "DATABASE_URL")), "Job") == []


# ---- Where pods run, and how many ----


def test_pods_are_spread_over_zones_and_nodes() -> None:
    found = template(rendered(VALUES["production"]))
    spread = found["spec"]["topologySpreadConstraints"]
    assert [one["topologyKey"] for one in spread] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    for one in spread:
        assert one["maxSkew"] == 1
        assert selects(one["labelSelector"], found["metadata"]["labels"])


def test_a_drain_of_nodes_takes_one_pod_at_a_time() -> None:
    objects = rendered(VALUES["production"])
    (budget,) = of_kind(objects, "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    assert selects(budget["spec"]["selector"], template(objects)["metadata"]["labels"])


def test_selectors_take_the_servers_and_nothing_else() -> None:
    objects = rendered(VALUES["everything"] | {"fullnameOverride": ""})
    labels = [pod["metadata"]["labels"] for pod in pods(objects)]
    others = [one for one in labels if one["app.kubernetes.io/component"] != "server"]
    assert len(others) == 4
    selectors = [{"matchLabels": one["spec"]["selector"]} for one in of_kind(objects, "Service")]
    selectors += [one["spec"]["selector"] for one in of_kind(objects, "PodDisruptionBudget")]
    selectors += [one["spec"]["selector"] for one in of_kind(objects, "StatefulSet")]
    assert len(selectors) == 4
    for selector in selectors:
        assert selects(selector, template(objects)["metadata"]["labels"])
        assert not any(selects(selector, one) for one in others)


def test_the_autoscaler_looks_at_the_processor_and_at_the_requests_in_flight() -> None:
    objects = rendered(VALUES["production"])
    (one,) = of_kind(objects, "ScaledObject")
    assert one["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": NAME}
    assert (one["spec"]["minReplicaCount"], one["spec"]["maxReplicaCount"]) == (3, 10)
    cpu, prometheus = one["spec"]["triggers"]
    assert (cpu["type"], cpu["metadata"]) == ("cpu", {"value": "70"})
    assert container(objects)["resources"]["requests"]["cpu"]
    assert prometheus["metadata"]["threshold"] == "50"
    assert int(prometheus["metadata"]["threshold"]) < 200  # MAX_IN_FLIGHT
    # The dashboards' own name of the metric.
    series = value(names.REQUESTS_IN_FLIGHT).partition("{")[0]
    query = prometheus["metadata"]["query"]
    assert query == f'sum({series}{{service_name="llmops-api", deployment_environment_name="production"}})'
    promql_parser.parse(query)
    # Whoever scales, scales alone.
    assert "replicas" not in only(objects, "StatefulSet")["spec"]


def test_the_autoscaler_counts_what_the_service_calls_itself() -> None:
    changes = {"settings": {"OTEL_SERVICE_NAME": "llm", "ENVIRONMENT": None}}
    (one,) = of_kind(rendered(merged(VALUES["production"], changes)), "ScaledObject")
    query = one["spec"]["triggers"][1]["metadata"]["query"]
    assert 'service_name="llm", deployment_environment_name="development"' in query


def test_there_is_no_autoscaler_by_default() -> None:
    objects = rendered({})
    assert of_kind(objects, "ScaledObject") == []
    assert only(objects, "StatefulSet")["spec"]["replicas"] == 1


# ---- The network ----


def test_everything_is_denied_that_no_rule_permits() -> None:
    objects = rendered(VALUES["everything"] | {"fullnameOverride": ""})
    deny = only(objects, "NetworkPolicy", f"{NAME}-default-deny")["spec"]
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & deny.keys()
    for pod in pods(objects):
        assert selects(deny["podSelector"], pod["metadata"]["labels"])
    for policy in of_kind(objects, "NetworkPolicy"):
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        for rule in policy["spec"].get("egress", []):
            # A rule without them permits everybody, or every port.
            assert rule["to"]
            assert rule["ports"]
        for rule in policy["spec"].get("ingress", []):
            assert rule["from"]
            assert rule["ports"]


def test_the_api_reaches_what_it_needs_and_nothing_else() -> None:
    objects = rendered(VALUES["production"])
    policy = only(objects, "NetworkPolicy")["spec"]
    assert selects(policy["podSelector"], template(objects)["metadata"]["labels"])
    given = merged(DEFAULTS, VALUES["production"])["networkPolicy"]["egress"]
    assert given.keys() == DEPENDENCIES
    wanted = [
        {"to": rule["to"], "ports": [{"protocol": "TCP"} | port for port in rule["ports"]]}
        for _, rule in sorted(given.items())
    ]
    assert policy["egress"] == wanted
    ports = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    assert ports == {53, 4000, 4317, 4318, 5000, 5432, 6333, 6379}


def test_a_dependency_that_is_removed_or_added_is_not_or_is_reached() -> None:
    rule = {"to": [{"ipBlock": {"cidr": "192.0.2.1/32"}}], "ports": [{"port": 443}]}
    values = {"networkPolicy": {"egress": {"valkey": None, "oidc": rule}}}
    egress = only(rendered(values), "NetworkPolicy")["spec"]["egress"]
    ports = {port["port"] for one in egress for port in one["ports"]}
    assert 6379 not in ports
    assert {"to": rule["to"], "ports": [{"port": 443, "protocol": "TCP"}]} in egress


def test_the_api_is_reached_by_the_gateway_and_the_test_alone() -> None:
    objects = rendered(VALUES["production"])
    (rule,) = only(objects, "NetworkPolicy")["spec"]["ingress"]
    test, gateway = rule["from"]
    assert selects(test["podSelector"], only(objects, "Pod", f"{NAME}-test")["metadata"]["labels"])
    assert not selects(test["podSelector"], template(objects)["metadata"]["labels"])
    assert gateway == VALUES["production"]["networkPolicy"]["ingress"]["from"][0]


def test_the_job_reaches_the_database_and_the_test_the_api() -> None:
    objects = rendered(VALUES["production"])
    for component, ports in (("migrate", {53, 5432}), ("test", {53, 8000})):
        spec = only(objects, "NetworkPolicy", f"{NAME}-{component}")["spec"]
        assert "ingress" not in spec
        assert {port["port"] for rule in spec["egress"] for port in rule["ports"]} == ports
        (pod,) = (
            one
            for one in pods(objects)
            if one["metadata"]["labels"]["app.kubernetes.io/component"] == component
        )
        assert selects(spec["podSelector"], pod["metadata"]["labels"])


# ---- From outside ----


def test_nothing_leads_in_from_outside_by_default() -> None:
    objects = rendered({})
    assert of_kind(objects, "Ingress") == of_kind(objects, "HTTPRoute") == []
    assert only(objects, "Service")["spec"]["type"] == "ClusterIP"


@pytest.mark.parametrize(("stream_s", "limit"), [(None, "610"), (1200, "1210"), (86_400, "86410")])
def test_what_is_in_front_waits_longer_than_the_longest_stream(stream_s: int | None, limit: str) -> None:
    change = {"settings": {"STREAM_TIMEOUT_S": stream_s} if stream_s else {}}
    (route,) = of_kind(rendered(merged(VALUES["production"], change)), "HTTPRoute")
    (rule,) = route["spec"]["rules"]
    assert rule["timeouts"] == {"request": f"{limit}s", "backendRequest": f"{limit}s"}
    (ingress,) = of_kind(rendered(merged(VALUES["small"], change)), "Ingress")
    given = ingress["metadata"]["annotations"]
    assert given["nginx.ingress.kubernetes.io/proxy-read-timeout"] == limit
    assert given["nginx.ingress.kubernetes.io/proxy-send-timeout"] == limit
    assert given["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert given["nginx.ingress.kubernetes.io/proxy-body-size"] == "104857600"


def test_another_controller_gets_its_own_annotations() -> None:
    (ingress,) = of_kind(rendered(VALUES["everything"]), "Ingress")
    assert ingress["metadata"]["annotations"] == VALUES["everything"]["ingress"]["annotations"]


def test_what_leads_in_leads_to_the_service() -> None:
    (route,) = of_kind(rendered(VALUES["production"]), "HTTPRoute")
    assert route["spec"]["hostnames"] == ["llm.example.org"]
    assert route["spec"]["rules"][0]["backendRefs"] == [{"name": NAME, "port": 80}]
    objects = rendered(VALUES["small"])
    (ingress,) = of_kind(objects, "Ingress")
    (rule,) = ingress["spec"]["rules"]
    assert rule["host"] == "llm.example.org"
    assert rule["http"]["paths"][0]["backend"] == {"service": {"name": NAME, "port": {"name": "http"}}}
    assert ingress["spec"]["tls"] == [{"secretName": "llm-example-org", "hosts": ["llm.example.org"]}]
    (port,) = only(objects, "Service")["spec"]["ports"]
    assert (port["name"], port["port"]) == ("http", 80)


def test_the_test_of_a_release_asks_for_readiness_through_the_service() -> None:
    pod = only(rendered({}), "Pod", f"{NAME}-test")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (one,) = pod["spec"]["containers"]
    assert one["args"] == [NAME, "80"]
    assert "/health/detailed" in one["command"][-1]
    compile(one["command"][-1], "ready", "exec")
