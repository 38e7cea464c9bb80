"""The addresses in ``VALKEY_URL``: of one server, of nodes of a cluster, or of sentinels."""

import re
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

MAX_NODES: Final = 16
"""Addresses of one URL; a few are enough to find the others."""

PORT: Final = 6379
SENTINEL_PORT: Final = 26379

Kind = Literal["server", "cluster", "sentinel"]

_URL = re.compile(
    r"(?P<scheme>valkey|redis)(?P<tls>s?)(?:\+(?P<kind>cluster|sentinel))?://"
    r"(?:(?P<user>[^\s/?#@:]*)(?::(?P<password>[^\s/?#@]*))?@)?(?P<nodes>[^\s/?#@]+)(?P<path>(?:/[^\s/?#@]*)*)"
)
HOST: Final = re.compile(
    r"[0-9a-f]*:[0-9a-f:.]+|[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?"
)
"""An IPv6 address, or a name in lower case."""

_SERVICE = re.compile(r"[A-Za-z0-9_.-]{1,256}")
_DATABASE = re.compile(r"[0-9]{0,4}")


@dataclass(frozen=True, slots=True)
class ValkeyAddress:
    """What a URL says.

    Args:
        kind: What is at the addresses.
        tls: Whether it is spoken to over TLS, and so are the servers that it names.
        nodes: Hosts with their ports.
        username: Of the servers, and of the sentinels.
        password: Likewise.
        service: The name of the servers that the sentinels watch.
        database: Number of the database; a cluster has one only.
    """

    kind: Kind
    tls: bool
    nodes: tuple[tuple[str, int], ...]
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    service: str = ""
    database: int = 0


def parse_valkey_url(url: str) -> ValkeyAddress:
    """Read a URL; raises ``ValueError`` with what is wrong, which holds nothing of the URL."""
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError("it has none of the forms")
    kind: Kind = found["kind"] or "server"  # type: ignore[assignment]  # what the pattern lets through
    places = found["nodes"].split(",")
    if kind == "server" and len(places) > 1:
        raise ValueError("it names several servers, but says neither +cluster nor +sentinel")
    if len(places) > MAX_NODES:
        raise ValueError(f"it has more than {MAX_NODES} addresses")
    path = found["path"].removeprefix("/")
    service = ""
    if kind == "sentinel":
        service, _, path = path.partition("/")
        if not _SERVICE.fullmatch(service):
            raise ValueError("behind the sentinels' addresses it has no valid name of the service they watch")
    if not _DATABASE.fullmatch(path):
        raise ValueError("the database is not a number")
    database = int(path or 0)
    if kind == "cluster" and database:
        raise ValueError("a cluster has no other database than 0")
    return ValkeyAddress(
        kind,
        bool(found["tls"]),
        tuple(_node(place, SENTINEL_PORT if kind == "sentinel" else PORT) for place in places),
        unquote(found["user"] or "") or None,
        unquote(found["password"] or "") or None,
        service,
        database,
    )


def _node(text: str, port: int) -> tuple[str, int]:
    try:
        address = urlsplit(f"//{text}")
        host, number = address.hostname or "", address.port
    except ValueError:
        host, number = "", None
    if not HOST.fullmatch(host) or number == 0:
        raise ValueError("an address is not a host with a port") from None
    return host, number or port
