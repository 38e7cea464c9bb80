"""Every object that the chart renders is one that an API server accepts, and every pod is a safe one."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.helm.chart import RELEASE, VALUES, Object, helm, of_kind, pods, rendered
from tests.helm.kubernetes import faults

pytestmark = pytest.mark.stack

KINDS = {
    *(
        "ConfigMap",
        "HTTPRoute",
        "Ingress",
        "Job",
        "NetworkPolicy",
        "Pod",
        "PodDisruptionBudget",
        "ScaledObject",
    ),
    *("Service", "ServiceAccount", "StatefulSet"),
}


@pytest.fixture(params=sorted(VALUES))
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return rendered(VALUES[request.param])


@pytest.mark.parametrize("name", sorted(VALUES))
def test_it_passes_lint(name: str) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", values=VALUES[name])


@pytest.mark.parametrize("name", sorted(VALUES))
def test_it_renders_the_same_twice(name: str) -> None:
    first, second = (helm("template", RELEASE, values=VALUES[name]) for _ in range(2))
    assert first == second


def test_an_object_is_what_kubernetes_has(objects: list[Object]) -> None:
    for one in objects:
        assert faults(one) == [], (one["kind"], one["metadata"]["name"])


def test_all_kinds_are_tried() -> None:
    assert {one["kind"] for values in VALUES.values() for one in rendered(values)} == KINDS


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("StatefulSet", "spec.template.spec.terminationGraceSeconds", 5),
        ("StatefulSet", "spec.replicas", "three"),
        ("NetworkPolicy", "spec.policyTypes", "Ingress"),
        ("ConfigMap", "data.PORT", 8000),
        ("HTTPRoute", "spec.timeout", "5s"),
        ("HTTPRoute", "metadata.lables", {}),
        ("ScaledObject", "spec.minReplicas", 1),
        ("PodDisruptionBudget", "spec.maxUnavailable", [1]),
    ],
)
def test_what_kubernetes_does_not_have_is_found(kind: str, path: str, value: Any) -> None:
    found = inner = of_kind(rendered(VALUES["production"]), kind)[0]
    *folders, name = path.split(".")
    for folder in folders:
        inner = inner[folder]
    inner[name] = value
    assert faults(found) != []


def test_names_are_unique_and_short_enough_for_labels(objects: list[Object]) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 63 for _, name in names)


def test_the_longest_release_has_valid_names() -> None:
    text = helm("template", "r" * 53, values=VALUES["everything"] | {"fullnameOverride": ""})
    for one in yaml.safe_load_all(text):
        if one:
            # A pod of a StatefulSet gets its ordinal, and a revision's label eleven characters.
            assert len(one["metadata"]["name"]) <= 63 - (11 if one["kind"] == "StatefulSet" else 0)


def test_labels_are_those_that_kubernetes_recommends(objects: list[Object]) -> None:
    for one in objects:
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "llmops-api"
        assert labels["app.kubernetes.io/instance"] == RELEASE
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert {"app.kubernetes.io/version", "app.kubernetes.io/part-of", "helm.sh/chart"} <= labels.keys()


def test_labels_that_change_with_the_version_are_not_where_kubernetes_refuses_a_change(
    objects: list[Object],
) -> None:
    (one,) = of_kind(objects, "StatefulSet")
    fixed = [one["spec"]["selector"]["matchLabels"]]
    fixed += [claim["metadata"]["labels"] for claim in one["spec"].get("volumeClaimTemplates", [])]
    for labels in fixed:
        assert "app.kubernetes.io/version" not in labels
        assert "helm.sh/chart" not in labels
    assert "helm.sh/chart" not in one["spec"]["template"]["metadata"]["labels"]


def _restricted(spec: Object) -> Iterator[str]:
    """What the Pod Security Standard `restricted`, or this chart beyond it, has against a pod."""
    pod = spec["securityContext"]
    if not pod.get("runAsNonRoot") or not pod.get("runAsUser"):
        yield "may run as root"
    if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "no seccomp profile"
    if spec.get("automountServiceAccountToken") is not False:
        yield "has a token of the cluster"
    for name in ("hostNetwork", "hostPID", "hostIPC", "hostUsers", "initContainers", "ephemeralContainers"):
        if name in spec:
            yield name
    for volume in spec.get("volumes", []):
        if "persistentVolumeClaim" not in volume and "sizeLimit" not in volume.get("emptyDir", {}):
            yield f"the volume {volume['name']}"
    for one in spec["containers"]:
        yield from _restricted_container(one)


def _restricted_container(container: Object) -> Iterator[str]:
    given = container["securityContext"]
    if given.get("allowPrivilegeEscalation") is not False or given.get("privileged"):
        yield "privileges"
    if given.get("capabilities") != {"drop": ["ALL"]}:
        yield "capabilities"
    if given.get("readOnlyRootFilesystem") is not True:
        yield "a root file system that can be written to"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "a port of the node"
    resources = container["resources"]
    if not {"cpu", "memory"} <= resources["requests"].keys() or "memory" not in resources["limits"]:
        yield "no limits"


def test_every_pod_is_restricted(objects: list[Object]) -> None:
    found = list(pods(objects))
    assert len(found) >= 2
    for pod in found:
        assert list(_restricted(pod["spec"])) == []


@pytest.mark.parametrize(
    "change",
    [
        {"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}},
        {"securityContext": {"runAsNonRoot": True, "runAsUser": 1}},
        {"automountServiceAccountToken": True},
        {"hostNetwork": False},
        {"volumes": [{"name": "a", "hostPath": {"path": "/"}}]},
        {"volumes": [{"name": "a", "emptyDir": {}}]},
    ],
)
def test_an_unsafe_pod_is_found(change: dict[str, Any]) -> None:
    (found,) = of_kind(rendered({}), "StatefulSet")
    assert list(_restricted(found["spec"]["template"]["spec"] | change)) != []


@pytest.mark.parametrize("field", ["allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem"])
def test_an_unsafe_container_is_found(field: str) -> None:
    (found,) = of_kind(rendered({}), "StatefulSet")
    spec = found["spec"]["template"]["spec"]
    del spec["containers"][0]["securityContext"][field]
    assert list(_restricted(spec)) != []


@pytest.mark.parametrize("name", sorted(VALUES))
def test_images_have_an_exact_tag_and_the_digest_that_is_given(name: str) -> None:
    given = VALUES[name].get("image", {})
    wanted = f"{given.get('repository', 'llmops-api')}:0.1.0" + (
        f"@{given['digest']}" if "digest" in given else ""
    )
    for pod in pods(rendered(VALUES[name])):
        assert {one["image"] for one in pod["spec"]["containers"]} == {wanted}


def test_there_is_no_secret_in_any_object(objects: list[Object]) -> None:
    assert of_kind(objects, "Secret") == []
