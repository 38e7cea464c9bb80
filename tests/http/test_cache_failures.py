"""Whatever happens to the vector store, a call is answered as without a cache, in little more time."""

import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.cache.store import COLLECTION
from tests.fakes.qdrant import FakeQdrant, Mode
from tests.fakes.upstream import FakeUpstream, refusing_port
from tests.harness import Answer, AppUnderTest, running_app
from tests.http.support import eventually

SLOW_S = 30.0
LIMIT_S = 0.5


@pytest.fixture
def qdrant() -> Iterator[FakeQdrant]:
    with FakeQdrant(SLOW_S).serving() as fake:
        yield fake


def settings(upstream: FakeUpstream, **more: Any) -> dict[str, Any]:
    # No memory of the process: each look-up goes to the store.
    return {
        "litellm_url": upstream.url,
        "cache_enabled": True,
        "cache_timeout_s": LIMIT_S,
        "cache_memory_bytes": 0,
        **more,
    }


def ask(app: AppUnderTest, token: str, prompt: str = "What?") -> Answer:
    answer = app.call("POST", "/llm/generate", body={"prompt": prompt}, token=token)
    assert (answer.status, answer.json["response"]) == (200, "Hello from the fake."), answer.body
    return answer


def errors_said(app: AppUnderTest) -> list[str]:
    return [line["reason"] for line in app.lines() if line.get("event") == "llmops.cache.error"]


def stored(app: AppUnderTest) -> None:
    eventually(lambda: app.value("llmops.cache.writes", outcome="stored") >= 1, "a written entry")


def test_a_server_answers_from_its_collections(upstream: FakeUpstream, qdrant: FakeQdrant) -> None:
    with running_app(**settings(upstream, qdrant_url=qdrant.url)) as app:
        token = app.token()
        ask(app, token)
        stored(app)
        assert ask(app, token).headers["x-cache"] == "HIT"
        assert app.call("GET", "/llm/cache/stats", token=token).json["entries"] == 1

    assert len(upstream.chat_requests) == 1
    assert (COLLECTION, "tenant") in qdrant.indexes
    (point,) = qdrant.collections[COLLECTION].values()
    assert set(point["payload"]) == {"key", "tenant", "model", "created", "expires", "cost", "body"}


@pytest.mark.parametrize(
    ("asked", "created"),
    [
        ({}, {}),
        (
            {"qdrant_shard_number": 6, "qdrant_replication_factor": 2},
            {"shard_number": 6, "replication_factor": 2},
        ),
    ],
    ids=["the server's", "ours"],
)
def test_a_cluster_gets_the_shards_and_copies_of_the_settings(
    upstream: FakeUpstream, qdrant: FakeQdrant, asked: dict[str, int], created: dict[str, int]
) -> None:
    with running_app(**settings(upstream, qdrant_url=qdrant.url, **asked)) as app:
        ask(app, app.token())
        stored(app)
    body = {name: value for name, value in qdrant.created[COLLECTION].items() if value is not None}
    # One copy is enough for a write: those on nodes that are lost are not waited for.
    assert body == {"vectors": {}, "write_consistency_factor": 1, **created}


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("slow", "slow"), ("error", "status_500"), ("garbage", "nonsense"), ("reset", "broken_off")],
)
def test_a_failing_server_costs_little_and_is_said_once(
    upstream: FakeUpstream, qdrant: FakeQdrant, mode: Mode, reason: str
) -> None:
    with running_app(**settings(upstream, qdrant_url=qdrant.url)) as app:
        token = app.token()
        ask(app, token, "first")
        stored(app)
        qdrant.mode = mode
        started = time.monotonic()
        answers = [ask(app, token, "first") for _ in range(6)]
        taken_s = time.monotonic() - started

        assert {answer.headers["x-cache"] for answer in answers} == {"MISS"}
        assert taken_s < SLOW_S, "not one look-up waited for the store's answer"
        assert errors_said(app) == [reason]
        assert app.value("llmops.cache.lookups", result="error") == 6
        assert app.value("llmops.circuit_breaker.state", breaker="qdrant", state="open") == 1
        assert app.value("llmops.circuit_breaker.state", breaker="litellm", state="closed") == 1
    assert len(upstream.chat_requests) == 7


def test_a_server_that_is_not_there_changes_nothing_for_callers(upstream: FakeUpstream) -> None:
    with (
        refusing_port() as port,
        running_app(**settings(upstream, qdrant_url=f"http://127.0.0.1:{port}")) as app,
    ):
        token = app.token()
        assert [ask(app, token).headers["x-cache"] for _ in range(2)] == ["MISS", "MISS"]
        assert errors_said(app) == ["unreachable"]
        eventually(
            lambda: app.call("GET", "/health/detailed").json["checks"]["qdrant"] is False, "the health"
        )
        refused = app.call("DELETE", "/llm/cache", token=app.token("admin"))
        assert (refused.status, refused.json["error"]) == (502, "UpstreamError")
        assert app.call("GET", "/llm/cache/stats", token=token).json["entries"] is None


def test_a_collection_that_vanishes_is_made_again(upstream: FakeUpstream, qdrant: FakeQdrant) -> None:
    with running_app(**settings(upstream, qdrant_url=qdrant.url)) as app:
        token = app.token()
        ask(app, token)
        stored(app)
        qdrant.collections.clear()
        assert ask(app, token).headers["x-cache"] == "MISS"
        eventually(lambda: qdrant.collections.get(COLLECTION), "the collection")
        assert ask(app, token).headers["x-cache"] == "HIT"
        assert errors_said(app) == ["no_collection"]
        assert app.value("llmops.cache.lookups", result="error") == 0


def test_a_server_that_comes_back_empty_is_filled_again(upstream: FakeUpstream, qdrant: FakeQdrant) -> None:
    qdrant.mode = "error"
    with running_app(**settings(upstream, qdrant_url=qdrant.url)) as app:
        token = app.token()
        ask(app, token)
        qdrant.mode = "ok"
        # The writer keeps what it could not write, and tries again by itself.
        eventually(lambda: qdrant.collections.get(COLLECTION), "the entry", limit_s=30)
        eventually(lambda: ask(app, token).headers["x-cache"] == "HIT", "a hit", limit_s=30)
        assert any(line["message"] == "The cache works again" for line in app.lines())


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"body": "not JSON"},
        {"body": None},
        {"packed": "not base64 \x7f"},
        {"body": '{"choices": []}'},
        {"body": '{"choices": [{"message": {}, "finish_reason": "stop"}, 1]}'},
        {"created": "yesterday"},
        {"created": 10**400},
        {"expires": None},
        {"model": []},
        {"key": "somebody-else's"},
        {"tenant": "somebody-else"},
    ],
    ids=str,
)
def test_a_damaged_entry_is_a_miss_and_is_taken_out(
    upstream: FakeUpstream, qdrant: FakeQdrant, payload: dict[str, Any]
) -> None:
    with running_app(**settings(upstream, qdrant_url=qdrant.url)) as app:
        token = app.token()
        ask(app, token)
        stored(app)
        (point,) = qdrant.collections[COLLECTION].values()
        if payload:
            point["payload"] = {**point["payload"], **payload}
        else:
            point["payload"] = {}
        # Nothing new takes the damaged entry's place.
        app.call(
            "POST",
            "/llm/generate",
            body={"prompt": "What?"},
            token=token,
            headers={"Cache-Control": "no-store"},
        )
        if payload.get("model") != []:
            eventually(lambda: not qdrant.collections[COLLECTION], "the entry's end")
            assert errors_said(app) == ["damaged_entry"]
    assert len(upstream.chat_requests) == (1 if payload.get("model") == [] else 2)


def test_expired_entries_are_misses(upstream: FakeUpstream, qdrant: FakeQdrant) -> None:
    with running_app(**settings(upstream, qdrant_url=qdrant.url)) as app:
        token = app.token()
        ask(app, token)
        stored(app)
        (point,) = qdrant.collections[COLLECTION].values()
        point["payload"]["expires"] = time.time() - 1
        assert ask(app, token).headers["x-cache"] == "MISS"


HOLD = """
import sys, time
from qdrant_client import QdrantClient
client = QdrantClient(path=sys.argv[1])
print("held", flush=True)
sys.stdin.read()
client.close()
"""


def test_a_folder_that_another_process_has_is_used_once_it_is_free(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    folder = str(tmp_path / "qdrant")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        with running_app(**settings(upstream, qdrant_path=folder, health_interval_s=0.2)) as app:
            token = app.token()
            assert [ask(app, token).headers["x-cache"] for _ in range(2)] == ["MISS", "MISS"]
            assert app.call("GET", "/health/detailed").json["checks"]["qdrant"] is False
            holder.stdin.close()
            holder.wait()
            eventually(
                lambda: app.call("GET", "/health/detailed").json["checks"]["qdrant"], "the store to be up"
            )
            eventually(lambda: ask(app, token).headers["x-cache"] == "HIT", "a hit", limit_s=30)


@pytest.mark.parametrize("damage", ["meta", "database", "file"])
def test_a_damaged_folder_is_a_store_that_is_down(
    upstream: FakeUpstream, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "qdrant"
    with running_app(**settings(upstream, qdrant_path=str(folder))) as app:
        ask(app, app.token())
        stored(app)
    if damage == "meta":
        (folder / "meta.json").write_text("{")
    elif damage == "database":
        (database,) = folder.rglob("storage.sqlite")
        for leftover in (*folder.rglob("*-wal"), *folder.rglob("*-shm")):
            leftover.unlink()
        database.write_bytes(b"no database at all" * 100)
    else:
        shutil.rmtree(folder)
        folder.write_text("a file where a folder should be")
    with running_app(**settings(upstream, qdrant_path=str(folder))) as app:
        token = app.token()
        assert [ask(app, token).headers["x-cache"] for _ in range(2)] == ["MISS", "MISS"]
        assert app.call("GET", "/health").status == 200
        eventually(
            lambda: app.call("GET", "/health/detailed").json["checks"]["qdrant"] is False, "the health"
        )
        assert errors_said(app) == ["not_open"]


def test_the_embedded_store_does_not_wait_for_the_disk(upstream: FakeUpstream, tmp_path: Path) -> None:
    folder = tmp_path / "qdrant"
    with running_app(**settings(upstream, qdrant_path=str(folder))) as app:
        ask(app, app.token())
        stored(app)
    (database,) = folder.rglob("storage.sqlite")
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
