"""``make chart-test``: installs the chart with a real Helm at a real API server, and lets nothing run.

etcd, the API server and kubectl are built from their Go modules. There is no scheduler, no controller and no
kubelet: the server judges the objects, its admission judges the pods, and this program ends the hooks' Jobs
and pods.
"""

import base64
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from http.client import HTTPSConnection
from pathlib import Path
from ssl import create_default_context
from typing import Any, Final

import yaml

from deploy.backends import BINARIES
from deploy.child import Child
from deploy.ports import unused_port
from tests.helm.chart import CHART, EXAMPLES, NAME, RELEASE, VALUES, Object, merged, pods, rendered
from tests.helm.kubernetes import SCHEMAS

HOST: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 120
HELM_TIMEOUT_S: Final = 120
NAMESPACE: Final = "llm"

PLURALS: Final = {"HTTPRoute": "httproutes", "Ingress": "ingresses", "NetworkPolicy": "networkpolicies"}
UPGRADE: Final = {
    ("ConfigMap", '+RETRY_MAX: "1"'),
    ("StatefulSet", "-image: registry.example.org/llmops-api:0.1.0"),
    ("StatefulSet", "+image: registry.example.org/llmops-api:0.2.0"),
    # The pods are replaced when a setting changes.
    ("StatefulSet", "-checksum/config: *"),
    ("StatefulSet", "+checksum/config: *"),
    ("StatefulSet", "-generation: 2"),
    ("StatefulSet", "+generation: 3"),
}
"""What another image and another setting change, with the server's own count of changes."""

DIGEST: Final = re.compile(r"[0-9a-f]{32,}")
RESTRICTED: Final = "pod-security.kubernetes.io/enforce"


class RefusedError(Exception):
    """The API server refused an object; the message is its own."""


class ApiServer:
    """The API server, as somebody who may do everything."""

    def __init__(self, folder: Path, port: int, token: str) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self._port = port
        self._token = token
        self._certificate = folder / "certs/apiserver.crt"

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            self.ask("GET", "/readyz")
        except (OSError, RefusedError):
            return False
        return True

    def ask(self, method: str, path: str, body: Object | None = None, kind: str = "application/json") -> Any:
        """Send a request and return the answer; raises ``RefusedError``."""
        context = create_default_context(cafile=str(self._certificate))
        connection = HTTPSConnection(HOST, self._port, timeout=30, context=context)
        try:
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status >= 400:
            raise RefusedError(text)
        return json.loads(text) if text.startswith("{") else text

    def create(self, found: Object, *, dry_run: bool = False) -> None:
        """Create an object, or only ask whether it could be; unknown fields are refused."""
        query = "?fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
        self.ask("POST", _folder(found) + query, found)

    def write_kubeconfig(self) -> None:
        """Write the file with which Helm reaches it."""
        authority = base64.b64encode(self._certificate.read_bytes()).decode()
        cluster = {"server": f"https://{HOST}:{self._port}", "certificate-authority-data": authority}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": self._token}}],
            "contexts": [
                {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}
            ],
        }
        self.kubeconfig.write_text(yaml.safe_dump(config))


def _folder(found: Object) -> str:
    version, kind = found["apiVersion"], found["kind"]
    plural = PLURALS.get(kind, f"{kind.lower()}s")
    if kind in {"CustomResourceDefinition", "Namespace"}:
        where = plural
    else:
        where = f"namespaces/{NAMESPACE}/{plural}"
    return f"/{'apis' if '/' in version else 'api'}/{version}/{where}"


@contextmanager
def running(folder: Path) -> Iterator[ApiServer]:
    """Start etcd and the API server, with the resources of the Gateway API and of KEDA."""
    client, peer, port, token = unused_port(), unused_port(), unused_port(), secrets.token_hex(16)
    (folder / "tokens.csv").write_text(f"{token},test,test,system:masters\n")
    subprocess.run(
        ["openssl", "genrsa", "-out", str(folder / "accounts.key"), "2048"], check=True, capture_output=True
    )
    env = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    etcd = [
        *(str(BINARIES / "etcd"), f"--data-dir={folder / 'etcd'}", "--logger=zap", "--log-level=warn"),
        *(f"--listen-client-urls=http://{HOST}:{client}", f"--advertise-client-urls=http://{HOST}:{client}"),
        *(f"--listen-peer-urls=http://{HOST}:{peer}", f"--initial-advertise-peer-urls=http://{HOST}:{peer}"),
        f"--initial-cluster=default=http://{HOST}:{peer}",
    ]
    apiserver = [
        *(str(BINARIES / "kube-apiserver"), f"--etcd-servers=http://{HOST}:{client}"),
        *(f"--bind-address={HOST}", f"--advertise-address={HOST}", f"--secure-port={port}"),
        *(f"--cert-dir={folder / 'certs'}", f"--token-auth-file={folder / 'tokens.csv'}"),
        *(
            "--service-cluster-ip-range=10.0.0.0/24",
            "--authorization-mode=RBAC",
            "--endpoint-reconciler-type=none",
        ),
        *(
            f"--service-account-issuer=https://{HOST}",
            f"--service-account-key-file={folder / 'accounts.key'}",
        ),
        f"--service-account-signing-key-file={folder / 'accounts.key'}",
    ]
    with ExitStack() as stack:
        for name, command in (("etcd", etcd), ("kube-apiserver", apiserver)):
            child = Child(name, command, env=env, log=folder / f"{name}.log", stop_timeout_s=10)
            stack.enter_context(child)
        server = ApiServer(folder, port, token)
        _until(server.is_ready)
        server.write_kubeconfig()
        for path in sorted(SCHEMAS.glob("*.yaml")):
            server.create(yaml.load(path.read_text("utf-8"), Loader=yaml.CSafeLoader))
        labels = {RESTRICTED: "restricted", f"{RESTRICTED}-version": "latest"}
        server.create(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}
        )
        server.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}})
        for group in ("gateway.networking.k8s.io/v1", "keda.sh/v1alpha1"):
            _until(lambda group=group: _is_served(server, group))  # type: ignore[misc]
        yield server


def _is_served(server: ApiServer, group: str) -> bool:
    try:
        return bool(server.ask("GET", f"/apis/{group}")["resources"])
    except RefusedError:
        return False


def _until(is_done: Callable[[], bool]) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while not is_done():
        if time.monotonic() > end:
            raise TimeoutError("the API server did not start in time")
        time.sleep(0.2)


def end_hooks(server: ApiServer, ended: threading.Event) -> None:
    """Do what controllers would: end each Job and each pod well, until the event is set."""
    base = f"namespaces/{NAMESPACE}"
    while not ended.wait(0.2):
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        conditions = [
            {"type": kind, "status": "True", "reason": "Test", "message": "", "lastTransitionTime": now}
            for kind in ("SuccessCriteriaMet", "Complete")
        ]
        done = {"startTime": now, "completionTime": now, "succeeded": 1, "conditions": conditions}
        for job in server.ask("GET", f"/apis/batch/v1/{base}/jobs")["items"]:
            _patch(server, f"/apis/batch/v1/{base}/jobs/{job['metadata']['name']}/status", job, done)
        for pod in server.ask("GET", f"/api/v1/{base}/pods")["items"]:
            path = f"/api/v1/{base}/pods/{pod['metadata']['name']}/status"
            _patch(server, path, pod, {"phase": "Succeeded"})


@contextmanager
def hooks_ended(server: ApiServer) -> Iterator[None]:
    """End Jobs and pods well for as long as the block lasts."""
    ended = threading.Event()
    hooks = threading.Thread(target=end_hooks, args=(server, ended))
    hooks.start()
    try:
        yield
    finally:
        ended.set()
        hooks.join()


def _patch(server: ApiServer, path: str, found: Object, status: Object) -> None:
    if status.items() <= found.get("status", {}).items() or found["status"].get("succeeded"):
        return
    try:
        server.ask("PATCH", path, {"status": status}, "application/merge-patch+json")
    except RefusedError as error:
        # It may be gone by now.
        if "NotFound" not in str(error):
            raise


def helm(server: ApiServer, *arguments: str) -> str:
    """Run Helm at the API server, and return what it prints; raises ``RefusedError``."""
    done = subprocess.run(
        [
            str(BINARIES / "helm"),
            *arguments,
            "--kubeconfig",
            str(server.kubeconfig),
            "--namespace",
            NAMESPACE,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=HELM_TIMEOUT_S,
    )
    if done.returncode:
        raise RefusedError(done.stdout + done.stderr)
    return done.stdout


def kubectl(server: ApiServer, command: str, objects: list[Object], *arguments: str) -> str:
    """Run a command of kubectl over objects, on the server's side, and return what it prints.

    Raises:
        RefusedError: It fails, or the server warns of something.
    """
    done = subprocess.run(
        [
            *(str(BINARIES / "kubectl"), command, "--server-side", "--field-manager=helm", "--filename=-"),
            *("--kubeconfig", str(server.kubeconfig), "--namespace", NAMESPACE, *arguments),
        ],
        input=yaml.safe_dump_all(objects),
        capture_output=True,
        text=True,
        check=False,
        timeout=HELM_TIMEOUT_S,
        env=os.environ | {"KUBECTL_EXTERNAL_DIFF": "diff --unified=0 --new-file"},
    )
    if done.stderr or done.returncode not in ({0, 1} if command == "diff" else {0}):
        raise RefusedError(done.stdout + done.stderr)
    return done.stdout


def lasting(values: Object) -> list[Object]:
    """Return the objects that live as long as the release, so no hooks."""
    return [one for one in rendered(values) if "helm.sh/hook" not in one["metadata"].get("annotations", {})]


def changed_lines(diff: str) -> set[tuple[str, str]]:
    """Return the changed lines of a diff, each with the kind of its object, and without digests."""
    found, kind = set(), ""
    for line in diff.splitlines():
        if line.startswith("+++ "):
            # The file is called like the group, the version, the kind, the namespace and the object.
            kind = Path(line.split("\t")[0]).name.partition(f".{NAMESPACE}.")[0].rpartition(".")[2]
        elif line.startswith(("+", "-")) and not line.startswith("---"):
            found.add((kind, line[0] + DIGEST.sub("*", line[1:].strip())))
    return found


def check_diff(server: ApiServer) -> int:
    """Let kubectl apply all, and show that an upgrade differs in what was meant; the number of objects."""
    applied = 0
    for values in VALUES.values():
        # Admission looks for the account of a test's pod, which is not made in a rehearsal.
        objects = [one for one in rendered(values) if one["kind"] != "Pod"]
        printed = kubectl(server, "apply", objects, "--dry-run=server")
        if printed.count("serverside-applied (server dry run)") != len(objects):
            raise AssertionError(f"not all was applied:\n{printed}")
        applied += len(objects)
    values = VALUES["production"]
    kubectl(server, "apply", lasting(values))
    path = f"/apis/apps/v1/namespaces/{NAMESPACE}/statefulsets/{NAME}/scale"
    # As the autoscaler does it: that is no difference.
    server.ask("PATCH", path, {"spec": {"replicas": 4}}, "application/merge-patch+json")
    if same := kubectl(server, "diff", lasting(values)):
        raise AssertionError(f"the same values differ from what was applied:\n{same}")
    upgraded = lasting(merged(values, {"image": {"tag": "0.2.0"}, "settings": {"RETRY_MAX": 1}}))
    found = changed_lines(kubectl(server, "diff", upgraded))
    if found != UPGRADE:
        raise AssertionError(f"an upgrade differs in something else: {sorted(found ^ UPGRADE)}")
    kubectl(server, "apply", upgraded)
    if same := kubectl(server, "diff", upgraded):
        raise AssertionError(f"the upgrade differs from what was applied:\n{same}")
    return applied


def check_objects(server: ApiServer) -> int:
    """Ask for each object and each pod of a template whether it could be created."""
    count = 0
    for values in VALUES.values():
        objects = rendered(values)
        for pod in pods(objects):
            labels = pod["metadata"]["labels"]
            spec = pod["spec"] | {"serviceAccountName": "default", "restartPolicy": "Never"}
            # A claim of a StatefulSet becomes a volume of its pods.
            names = {volume["name"] for volume in spec.get("volumes", [])}
            mounts = {mount["name"] for one in spec["containers"] for mount in one.get("volumeMounts", [])}
            spec["volumes"] = [
                *spec.get("volumes", []),
                *(
                    {"name": name, "persistentVolumeClaim": {"claimName": name}}
                    for name in sorted(mounts - names)
                ),
            ]
            spec.pop("priorityClassName", None)
            found = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "pod", "labels": labels},
                "spec": spec,
            }
            server.create(found, dry_run=True)
            count += 1
        for one in objects:
            if one["kind"] != "Pod":
                server.create(one, dry_run=True)
                count += 1
    return count


def check_refusals(server: ApiServer) -> None:
    """Show that the server would refuse an unsafe pod and an unknown field."""
    (template,) = (one["spec"]["template"] for one in rendered({}) if one["kind"] == "StatefulSet")
    unsafe = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod"},
        "spec": {
            "containers": [template["spec"]["containers"][0] | {"securityContext": {}, "volumeMounts": []}]
        },
    }
    _must_refuse(lambda: server.create(unsafe, dry_run=True), "violates PodSecurity")
    (service, *_) = (one for one in rendered({}) if one["kind"] == "Service")
    service["spec"]["selectors"] = {}
    _must_refuse(lambda: server.create(service, dry_run=True), "unknown field")


def _must_refuse(do: Callable[[], None], said: str) -> None:
    try:
        do()
    except RefusedError as error:
        if said in str(error):
            return
        raise
    raise AssertionError(f"nothing was refused with: {said}")


def check_release(server: ApiServer) -> None:
    """Install, test, upgrade, roll back and uninstall, as deploy/README.md says."""
    values = ("--values", str(EXAMPLES / "production.yaml"))
    path = f"/apis/apps/v1/namespaces/{NAMESPACE}/statefulsets/{NAME}"
    with hooks_ended(server):
        helm(server, "install", RELEASE, str(CHART), *values, "--wait=hookOnly")
        helm(server, "test", RELEASE)
        before = server.ask("GET", path)["spec"]
        # As the autoscaler does it.
        server.ask("PATCH", f"{path}/scale", {"spec": {"replicas": 4}}, "application/merge-patch+json")
        helm(
            server,
            "upgrade",
            RELEASE,
            str(CHART),
            *values,
            "--set",
            "settings.RETRY_MAX=1",
            "--wait=hookOnly",
        )
        changed = server.ask("GET", path)["spec"]
        helm(server, "rollback", RELEASE, "--wait=hookOnly")
        after = server.ask("GET", path)["spec"]
    if changed["replicas"] != 4 or after["replicas"] != 4:
        raise AssertionError(
            "an upgrade or a rollback changed the number of pods behind the autoscaler's back"
        )
    if before["template"] == changed["template"] or before["template"] != after["template"]:
        raise AssertionError("an upgrade did not change the pods, or the rollback did not change them back")
    helm(server, "uninstall", RELEASE)


def main() -> int:
    """Run the checks; 1 where the API server refuses something."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
        version = server.ask("GET", "/version")["gitVersion"]
        count = check_objects(server)
        print(f"API server {version}: {count} objects and pods are accepted in a restricted namespace")
        check_refusals(server)
        print("An unsafe pod and an unknown field are refused")
        check_release(server)
        print("helm install, test, upgrade, rollback and uninstall work")
        count = check_diff(server)
        print(f"kubectl apply --server-side takes {count} objects without a warning")
        print("kubectl diff shows nothing for the same values, and of an upgrade what was changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
