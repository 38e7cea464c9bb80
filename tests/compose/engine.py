"""Podman and podman-compose as this proof runs them, with a store and settings of their own."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deploy.backends import ROOT

HERE: Final = ROOT / ".stack/compose"
PROGRAMS: Final = ("podman", "runc", "netavark", "aardvark-dns", "catatonit", "debootstrap")
PACKAGES: Final = "podman runc netavark aardvark-dns catatonit iptables debootstrap"
_LIBEXEC: Final = "/usr/lib/podman:/usr/libexec/podman:/usr/libexec/catatonit"
PODMAN_COMPOSE: Final = ROOT / ".venv-compose/bin/podman-compose"


class EngineError(Exception):
    """What a person must be told when the proof cannot go on."""


def missing() -> str:
    """Why this machine cannot run it, in one line; empty when it can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin:{_LIBEXEC}"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "make compose-test needs Linux and root."
    if absent:
        return f"make compose-test needs {', '.join(absent)}. On Debian: apt-get install {PACKAGES}"
    return ""


@dataclass(frozen=True)
class Process:
    """What the kernel says about a container's first process."""

    pid: int
    uids: frozenset[int]
    capabilities: int
    no_new_privileges: bool
    root_is_read_only: bool


class Engine:
    """The commands, with an environment that has nothing of the caller's shell in it.

    The limits on files and processes are left alone, because raising them needs CAP_SYS_RESOURCE. Containers
    are run by runc, because crun refuses a machine with both versions of control groups. Health checks are
    run by the proof, because Podman leaves them to systemd.
    """

    def __init__(self) -> None:
        HERE.mkdir(parents=True, exist_ok=True)
        (HERE / "containers.conf").write_text(
            '[containers]\ndefault_ulimits = []\n[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\n'
            'events_logger = "file"\n'
        )
        (HERE / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{HERE}/storage"\nrunroot = "{HERE}/run"\n'
        )
        self.environment = {
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "HOME": os.environ.get("HOME", "/root"),
            "LANG": "C.UTF-8",
            "CONTAINERS_CONF": str(HERE / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(HERE / "storage.conf"),
            "DISABLE_HC_SYSTEMD": "true",
        }

    def podman(self, *arguments: str, check: bool = True, timeout_s: float = 1200) -> str:
        """Run one command; its output, both streams."""
        done = subprocess.run(
            ["podman", *arguments],
            env=self.environment,
            cwd=HERE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode:
            raise EngineError(f"podman {' '.join(arguments)}: {done.stdout[-2000:]}")
        return done.stdout

    def succeeds(self, *arguments: str) -> bool:
        """Whether one command ends with exit status 0."""
        done = subprocess.run(
            ["podman", *arguments], env=self.environment, cwd=HERE, capture_output=True, check=False
        )
        return done.returncode == 0

    def compose(
        self, file: Path, project: str, variables: Mapping[str, str], *arguments: str
    ) -> subprocess.CompletedProcess[str]:
        """Run podman-compose on a file."""
        return subprocess.run(
            [str(PODMAN_COMPOSE), "-p", project, "-f", str(file), *arguments],
            env={**self.environment, **variables},
            cwd=file.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )

    def inspect(self, container: str) -> dict[str, Any]:
        """What the engine knows about a container."""
        found: dict[str, Any] = json.loads(self.podman("container", "inspect", container))[0]
        return found

    def logs(self, container: str) -> list[str]:
        """The lines that it wrote."""
        return self.podman("logs", container).splitlines()

    def process(self, container: str) -> Process:
        """What the kernel says about its first process."""
        pid = int(self.inspect(container)["State"]["Pid"])
        if not pid:
            raise EngineError(f"{container} does not run")
        status = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        )
        mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
        root = next(fields for fields in reversed(mounts) if fields[4] == "/")
        return Process(
            pid=pid,
            uids=frozenset(map(int, status["Uid"].split())),
            capabilities=int(status["CapEff"], 16) | int(status["CapPrm"], 16),
            no_new_privileges=status["NoNewPrivs"].strip() == "1",
            root_is_read_only="ro" in root[5].split(","),
        )

    def volume(self, name: str) -> Path:
        """Where a volume is on this machine."""
        return Path(self.podman("volume", "inspect", "--format", "{{.Mountpoint}}", name).strip())

    def version(self) -> str:
        """Name and version."""
        return self.podman("--version").strip()


def until(question: Any, what: str, limit_s: float, every_s: float = 0.5) -> float:
    """Ask until the answer is true; the seconds that it took.

    Raises:
        AssertionError: It is not so within the limit.
    """
    begun = time.monotonic()
    while not question():
        if time.monotonic() - begun > limit_s:
            raise AssertionError(f"{what}: not within {limit_s:.0f} s")
        time.sleep(every_s)
    return time.monotonic() - begun


def lines_of(text: Sequence[str]) -> list[dict[str, Any]]:
    """The lines that are JSON objects."""
    found = []
    for line in text:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
