"""Stand-ins for the images that cannot be had without a registry: Tempo, Loki, Grafana and the stores.

They run in containers, as the published images' users, on the published ports. Each makes the folders that
the real program makes in its volume, ends as that one does when it may not, and keeps what it gets there as
lines of JSON. They take the arguments of docker-compose.yml, their health checks included. The servers of
PostgreSQL and Valkey are the real ones; only the scripts that begin them are ours.
"""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import grpc  # type: ignore[import-untyped]

from tests.fakes.otlp_records import logs_in, spans_in
from tests.fakes.qdrant import FakeQdrant

PORTS: Final = {"tempo": 3200, "loki": 3100, "grafana": 3000, "qdrant": 6333}
SPANS: Final = Path("/var/tempo/blocks/spans.jsonl")
LINES: Final = Path("/loki/chunks/lines.jsonl")
_TRACES: Final = "opentelemetry.proto.collector.trace.v1.TraceService"
_ALL: Final = "0.0.0.0"  # noqa: S104 - a container's own network
_writing = threading.Lock()
POSTGRESQL_DATA: Final = Path("/var/lib/postgresql/18/docker")
POSTGRESQL_SOCKETS: Final = "/var/run/postgresql"
VALKEY: Final = Path("/usr/lib/valkey")
INIT_FILES: Final = Path("/docker-entrypoint-initdb.d")


def make(*paths: str) -> None:
    """Make folders in the volume; end as the real program does where that is forbidden."""
    for path in paths:
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"mkdir {path}: {(error.strerror or str(error)).lower()}")


def keep(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append the records to the file."""
    with _writing, path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, default=str) + "\n" for record in records)


class Http(BaseHTTPRequestHandler):
    """Answers every question with 200."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Say that all is well."""
        self._answer()

    def do_POST(self) -> None:
        """Take an export."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.take(body)
        self._answer()

    def take(self, body: bytes) -> None:
        """Do something with an export."""

    def _answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_args: object, **_kwargs: object) -> None:
        """Say nothing."""


def serve(port: int, handler: type[Http] = Http) -> None:
    """Serve until the signal to stop."""
    server = ThreadingHTTPServer((_ALL, port), handler)
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()


def tempo() -> None:
    """OTLP over gRPC; each span is kept in the volume."""
    make("/var/tempo/wal", "/var/tempo/blocks", "/var/tempo/live-store/traces", "/var/tempo/work")

    def export(payload: bytes, _context: object) -> bytes:
        keep(SPANS, [asdict(span) for span in spans_in(payload)])
        return b""

    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    handlers = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_TRACES, handlers),))
    server.add_insecure_port(f"{_ALL}:4317")
    server.start()
    serve(PORTS["tempo"])
    server.stop(grace=1).wait()


def loki() -> None:
    """OTLP over HTTP; each record is kept in the volume."""
    make("/loki/chunks", "/loki/rules", "/loki/compactor")

    class Loki(Http):
        def take(self, body: bytes) -> None:
            keep(LINES, [asdict(line) for line in logs_in(body)])

    serve(PORTS["loki"], Loki)


def grafana() -> None:
    """Reads what is mounted, and writes its database."""
    make("/var/lib/grafana/plugins")
    Path("/var/lib/grafana/grafana.db").touch()
    for folder in ("/etc/grafana/provisioning", "/etc/grafana/dashboards"):
        for path in Path(folder).rglob("*"):
            if path.is_file():
                path.read_bytes()
    serve(PORTS["grafana"])


def qdrant() -> None:
    """The tests' Qdrant, and a file where the real one keeps its collections."""
    make("/qdrant/storage/collections")
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    with FakeQdrant(address=(_ALL, PORTS["qdrant"])).serving():
        stopped.wait()


def postgres() -> None:
    """The real server; as in the published image, the files of a folder make what an empty volume gets."""
    make(str(POSTGRESQL_DATA.parent))
    server = ["postgres", "-D", str(POSTGRESQL_DATA), "-c", f"unix_socket_directories={POSTGRESQL_SOCKETS}"]
    if not (POSTGRESQL_DATA / "PG_VERSION").exists():
        _init_postgres()
    os.execvp(server[0], server)  # noqa: S606 - it takes the place of this script


def _init_postgres() -> None:
    password = Path("/tmp/password")  # noqa: S108 - the container's own
    password.write_text(os.environ["POSTGRES_PASSWORD"], encoding="utf-8")
    data = str(POSTGRESQL_DATA)
    _run(
        "initdb", "-D", data, "--username=postgres", f"--pwfile={password}", "--no-locale", "--encoding=UTF8"
    )
    password.unlink()
    with (POSTGRESQL_DATA / "pg_hba.conf").open("a", encoding="utf-8") as file:
        file.write("host all all all scram-sha-256\n")
    with (POSTGRESQL_DATA / "postgresql.conf").open("a", encoding="utf-8") as file:
        file.write("listen_addresses = '*'\n")
    # Nobody but these files reaches it before they are through.
    alone = f"-c listen_addresses='' -c unix_socket_directories={POSTGRESQL_SOCKETS}"
    _run("pg_ctl", "-D", data, "-o", alone, "-w", "start")
    for path in sorted(INIT_FILES.glob("*.sql")):
        psql = ("psql", "-v", "ON_ERROR_STOP=1", "--no-password", "--no-psqlrc", "-h", POSTGRESQL_SOCKETS)
        _run(*psql, "--username=postgres", "--dbname=postgres", "-f", str(path))
    _run("pg_ctl", "-D", data, "-m", "fast", "-w", "stop")


def valkey(*arguments: str) -> None:
    """The real server, with the arguments that the published image's script takes."""
    (server,) = VALKEY.rglob("valkey-server")
    os.execv(server, arguments)  # noqa: S606 - it takes the place of this script


def ask_valkey(*arguments: str) -> int:
    """Exit status of a health check: 0 when the server answers a ping."""
    with socket.create_connection((arguments[1], int(arguments[3])), timeout=4) as connection:
        connection.sendall(b"PING\r\n")
        return int(connection.recv(64) != b"+PONG\r\n")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def fetch(url: str) -> int:
    """Exit status of a health check: 0 when the URL is answered with 200."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=4)
    try:
        connection.request("GET", parts.path)
        return int(connection.getresponse().status != 200)
    except OSError:
        return 1


def main(program: str, *arguments: str) -> int:
    """Be this program, or its health check."""
    if program == "wget":
        return fetch(arguments[-1])
    if program == "valkey-cli":
        return ask_valkey(*arguments)
    if "-health" in arguments:
        return fetch(f"http://127.0.0.1:{PORTS[program]}/ready")
    for argument in arguments:
        if argument.startswith("-config.file="):
            Path(argument.partition("=")[2]).read_bytes()
    print(f"stand-in for {program}, user {os.getuid()}:{os.getgid()}", flush=True)
    if program == "valkey":
        valkey(*arguments)
    programs = {"tempo": tempo, "loki": loki, "grafana": grafana, "qdrant": qdrant, "postgres": postgres}
    programs[program]()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
