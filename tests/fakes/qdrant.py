"""A small Qdrant server over HTTP: what the cache asks of one, and the ways in which one fails."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Literal
from urllib.parse import unquote, urlsplit

Points = dict[str, dict[str, Any]]
Mode = Literal["ok", "slow", "error", "garbage", "reset"]

NOT_FOUND = 404


class FakeQdrant:
    """Collections in memory; ``mode`` says how the next requests are answered.

    Args:
        slow_s: Seconds that an answer takes in mode ``slow``.
        address: Where it listens; port 0 takes a free one.
    """

    def __init__(self, slow_s: float = 5.0, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.collections: dict[str, Points] = {}
        self.dimensions: dict[str, int | None] = {}
        self.created: dict[str, dict[str, Any]] = {}
        """By collection, what it was created with."""
        self.mode: Mode = "ok"
        self.ignores_filters = False
        self.slow_s = slow_s
        self.requests: list[tuple[str, str]] = []
        self.indexes: set[tuple[str, str]] = set()
        self.lock = threading.Lock()
        self._released = threading.Event()
        fake = self

        class Handler(_Handler):
            server_fake = fake

        self._server = ThreadingHTTPServer(address, Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="fake qdrant")

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def wait_slowly(self) -> None:
        """Take the time of a slow answer, or less when the fake ends."""
        self._released.wait(self.slow_s)

    @contextmanager
    def serving(self) -> Iterator["FakeQdrant"]:
        """Serve until the block ends."""
        self._thread.start()
        try:
            yield self
        finally:
            self._released.set()
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_fake: ClassVar[FakeQdrant]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the interface's name
        """Say nothing."""

    def handle(self) -> None:
        """Serve the connection until it ends, in order or by a reset."""
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        self._handle("GET")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_DELETE(self) -> None:
        self._handle("DELETE")

    def _handle(self, method: str) -> None:
        fake = self.server_fake
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        if len(content) < length:
            # Who asked has left in the middle.
            self.close_connection = True
            return
        body = json.loads(content) if content else {}
        path = unquote(urlsplit(self.path).path)
        fake.requests.append((method, path))
        if fake.mode == "slow":
            fake.wait_slowly()
        if fake.mode == "reset":
            self.close_connection = True
            self.connection.close()
            return
        if fake.mode == "garbage":
            self._send(200, b"<html>this is no Qdrant</html>")
            return
        if fake.mode == "error":
            self._send(500, b'{"status":{"error":"the fake was told to fail"}}')
            return
        if fake.ignores_filters:
            body.pop("filter", None)
        with fake.lock:
            status, result = self._answer(method, path.strip("/").split("/"), body)
        payload = {"result": result, "status": "ok", "time": 0.0}
        if status == NOT_FOUND:
            payload = {"status": {"error": "Not found: Collection doesn't exist!"}, "time": 0.0}
        elif status != 200:
            payload = {"status": {"error": str(result)}, "time": 0.0}
        self._send(status, json.dumps(payload).encode())

    def _send(self, status: int, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def _answer(  # noqa: PLR0911 - one a route
        self, method: str, parts: list[str], body: dict[str, Any]
    ) -> tuple[int, Any]:
        fake = self.server_fake
        if parts == ["readyz"]:
            return 200, "all shards are ready"
        if parts == ["collections"]:
            return 200, {"collections": [{"name": name} for name in fake.collections]}
        name, rest = parts[1], parts[2:]
        if rest == ["exists"]:
            return 200, {"exists": name in fake.collections}
        if not rest and method == "PUT":
            vectors = body.get("vectors") or {}
            fake.collections[name] = {}
            fake.dimensions[name] = vectors.get("size")
            fake.created[name] = body
            return 200, True
        if name not in fake.collections:
            return NOT_FOUND, None
        if not rest and method == "GET":
            return 200, _info(fake.dimensions[name])
        if not rest and method == "DELETE":
            del fake.collections[name]
            return 200, True
        return _points(fake, name, method, rest, body)


def _points(  # noqa: C901, PLR0911 - one case a route
    fake: FakeQdrant, name: str, method: str, rest: list[str], body: dict[str, Any]
) -> tuple[int, Any]:
    points = fake.collections[name]
    done = {"operation_id": 1, "status": "completed"}
    match rest:
        case ["index"]:
            fake.indexes.add((name, body["field_name"]))
            return 200, done
        case ["points"] if method == "PUT":
            for point in body["points"]:
                vector = point["vector"]
                wanted = fake.dimensions[name]
                if wanted is not None and len(vector) != wanted:
                    return 400, f"Wrong input: Vector dimension error: expected dim: {wanted}"
                points[str(point["id"])] = {"payload": point["payload"], "vector": vector}
            return 200, done
        case ["points"]:
            found = [(key, points[key]) for key in map(str, body["ids"]) if key in points]
            return 200, [{"id": key, "payload": point["payload"]} for key, point in found]
        case ["points", "query"]:
            return 200, {"points": _nearest(points, body)}
        case ["points", "count"]:
            return 200, {"count": sum(_matches(point, body.get("filter")) for point in points.values())}
        case ["points", "delete"]:
            for key in map(str, body["points"]):
                points.pop(key, None)
            return 200, done
        case ["points", "scroll"]:
            chosen = [key for key, point in points.items() if _matches(point, body.get("filter"))]
            if body.get("order_by"):
                chosen.sort(key=lambda key: points[key]["payload"]["created"])
            return 200, {"points": [{"id": key} for key in chosen[: body["limit"]]], "next_page_offset": None}
    return 400, "the fake does not know this"


def _info(dimension: int | None) -> dict[str, Any]:
    vectors = {} if dimension is None else {"size": dimension, "distance": "Cosine"}
    hnsw = {"m": 16, "ef_construct": 100, "full_scan_threshold": 10_000}
    optimizer = {
        "deleted_threshold": 0.2,
        "vacuum_min_vector_number": 1_000,
        "default_segment_number": 0,
        "flush_interval_sec": 5,
    }
    config = {"params": {"vectors": vectors}, "hnsw_config": hnsw, "optimizer_config": optimizer}
    return {
        "status": "green",
        "optimizer_status": "ok",
        "segments_count": 1,
        "config": config,
        "payload_schema": {},
    }


def _nearest(points: Points, body: dict[str, Any]) -> list[dict[str, Any]]:
    asked = body["query"]
    query = asked["nearest"] if isinstance(asked, dict) else asked
    scored = [
        (_cosine(query, point["vector"]), key, point["payload"])
        for key, point in points.items()
        if _matches(point, body.get("filter"))
    ]
    scored.sort(key=lambda entry: -entry[0])
    return [
        {"id": key, "version": 0, "score": score, "payload": payload}
        for score, key, payload in scored[: body["limit"]]
        if score >= body.get("score_threshold", -1)
    ]


def _cosine(first: list[float], second: list[float]) -> float:
    product = sum(a * b for a, b in zip(first, second, strict=True))
    lengths = sum(a * a for a in first) ** 0.5 * sum(b * b for b in second) ** 0.5
    return float(product / lengths) if lengths else 0.0


def _matches(point: dict[str, Any], wanted: dict[str, Any] | None) -> bool:
    for condition in (wanted or {}).get("must") or ():
        value = point["payload"].get(condition["key"])
        if condition.get("match") and value != condition["match"]["value"]:
            return False
        limits = condition.get("range")
        if limits and not (isinstance(value, float | int) and value <= limits["lte"]):
            return False
    return True
