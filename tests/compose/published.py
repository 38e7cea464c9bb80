"""Users and volume folders of the images in docker-compose.yml, from their published Dockerfiles.

An image that is built here is read from its own Dockerfile. The others are written down: they cannot be had
everywhere, and a wrong owner shows only when a container starts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

WRITE: Final = 0o2


@dataclass(frozen=True)
class Folder:
    """Owner and mode of a folder."""

    uid: int
    gid: int
    mode: int

    def may_be_written_by(self, uid: int, gid: int) -> bool:
        """Whether this user may write here without any capability, root included."""
        if uid == self.uid:
            return bool(self.mode >> 6 & WRITE)
        if gid == self.gid:
            return bool(self.mode >> 3 & WRITE)
        return bool(self.mode & WRITE)


@dataclass(frozen=True)
class Image:
    """What an image says about its user, and the folders in it that volumes are mounted on.

    Attributes:
        folders: A path that is absent here is absent in the image; a new volume there belongs to root.
        source: Where it is written.
    """

    uid: int
    gid: int
    source: str
    folders: Mapping[str, Folder] = field(default_factory=dict)

    def volume(self, path: str) -> Folder:
        """Owner and mode of a new named volume at this path: the engine copies the image's folder."""
        return self.folders.get(path, Folder(0, 0, 0o755))


PUBLISHED: Final[Mapping[str, Image]] = {
    # USER ${USER_UID}:${USER_GID}, both 10001, FROM scratch; no folder is made.
    "otel/opentelemetry-collector-contrib": Image(
        uid=10001,
        gid=10001,
        source="open-telemetry/opentelemetry-collector-releases distributions/otelcol-contrib/Dockerfile",
    ),
    # adduser -u 10001; mkdir -p /var/tempo && chown -R tempo:tempo /var/tempo; USER 10001:10001
    "grafana/tempo": Image(
        uid=10001,
        gid=10001,
        source="grafana/tempo cmd/tempo/Dockerfile",
        folders={"/var/tempo": Folder(10001, 10001, 0o755)},
    ),
    # adduser -u 10001; mkdir -p /loki/rules /loki/rules-temp; chown -R loki:loki /etc/loki /loki; USER 10001
    "grafana/loki": Image(
        uid=10001,
        gid=10001,
        source="grafana/loki cmd/loki/Dockerfile",
        folders={"/loki": Folder(10001, 10001, 0o755)},
    ),
    # WORKDIR /prometheus; chown -R nobody:nobody /prometheus && chmod g+w /prometheus; USER nobody
    "prom/prometheus": Image(
        uid=65534,
        gid=65534,
        source="prometheus/prometheus Dockerfile",
        folders={"/prometheus": Folder(65534, 65534, 0o775)},
    ),
    # GF_UID=472 GF_GID=0; chown -R "grafana:$GF_GID_NAME" and chmod -R 777 of $GF_PATHS_DATA; USER "$GF_UID"
    "grafana/grafana": Image(
        uid=472,
        gid=0,
        source="grafana/grafana Dockerfile",
        folders={"/var/lib/grafana": Folder(472, 0, 0o777)},
    ),
    # useradd --uid=999 postgres; install --directory --owner postgres --mode 1777 /var/lib/postgresql
    "postgres": Image(
        uid=0,
        gid=0,
        source="docker-library/postgres 18/trixie/Dockerfile",
        folders={"/var/lib/postgresql": Folder(999, 999, 0o1777)},
    ),
    # USER_ID=0, with which no storage folder is made; USER "$USER_ID:$USER_ID"
    "qdrant/qdrant": Image(uid=0, gid=0, source="qdrant/qdrant Dockerfile"),
    # useradd -r -g valkey -u 999 valkey; its entry point changes to that user where it begins as root
    "valkey/valkey": Image(uid=0, gid=0, source="valkey-io/valkey-container 9.1/debian/Dockerfile"),
}

_USER = re.compile(r"^USER (\d+):(\d+)$", re.MULTILINE)
_FOLDERS = re.compile(r"install -d -o (\d+) -g (\d+) ([^\n&]+)")


def built(dockerfile: Path) -> Image:
    """Read one of our own Dockerfiles."""
    text = dockerfile.read_text(encoding="utf-8")
    users = _USER.findall(text)
    if not users:
        raise LookupError(f"{dockerfile} names no numeric user")
    folders = {
        path: Folder(int(uid), int(gid), 0o755)
        for uid, gid, paths in _FOLDERS.findall(text)
        for path in paths.split()
    }
    return Image(int(users[-1][0]), int(users[-1][1]), str(dockerfile), folders)
