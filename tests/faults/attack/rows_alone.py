"""Rows whose store or disk fails: they have a service of their own, with a second user of its own."""

import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.test_hung_disk import SCRIPT, Disk
from tests.fakes.qdrant import FakeQdrant
from tests.faults.attack.rows import Finding, Rows
from tests.faults.attack.target import Target, wait_for

ALONE: Rows["Failing"] = Rows()
CALLS = 40
LAST_S = 1.0


@dataclass
class Failing:
    """A service whose store and whose disk do as a row says."""

    target: Target
    store: FakeQdrant
    disk: Disk


@contextmanager
def failing() -> Iterator[Failing]:
    """Start the service, its store and its disk."""
    with tempfile.TemporaryDirectory() as folder, FakeQdrant(slow_s=1.5).serving() as store:
        disk = Disk(Path(folder))
        given = {**disk.variables, "QDRANT_URL": store.url, "CACHE_MAX_ENTRIES": "20000"}
        with Target(given, (str(SCRIPT),)) as target:
            yield Failing(target, store, disk)
            target.process.stop()


@ALONE.row(
    "clearing one user's cache while the store is slow",
    "answers of two users wait for a slow store; an administrator clears those of one",
    "the other's are written when the store is back",
)
def _(alone: Failing, found: Finding) -> None:
    target, store = alone.target, alone.store
    prompts = {user: f"{user} {secrets.token_hex(8)}" for user in ("user", "admin")}
    tokens = {"user": target.token, "admin": target.admin}
    # The second user's answers are always on their way: the writer is busy with them when it is slow.
    store.mode = "slow"
    time.sleep(0.3)
    for user, prompt in prompts.items():
        answer = target.call("POST", "/llm/generate", body={"prompt": prompt}, token=tokens[user])
        found.expect(answer.status == 200, f"{user}: {answer.status}")
    with ThreadPoolExecutor(1) as pool:
        clearing = pool.submit(
            target.call, "DELETE", "/llm/cache?user=user", token=target.admin, timeout_s=60
        )
        time.sleep(0.3)
        store.mode = "ok"
        cleared = clearing.result()
    wait_for(lambda: target.call("GET", "/llm/cache/stats").json["waiting"] == 0, 15)

    def hit(user: str) -> str:
        asked = target.call("POST", "/llm/generate", body={"prompt": prompts[user]}, token=tokens[user])
        return str(asked.json["cache"])

    seen = {user: hit(user) for user in prompts}
    found.say(f"DELETE: {cleared.status}; then {seen}")
    found.expect(seen == {"user": "miss", "admin": "hit"}, f"{seen}")


@ALONE.row(
    "a hung disk under the spool",
    f"{CALLS} calls while the disk of the spool answers nothing",
    "all answered, /health too; the records wait in memory and arrive when the disk is back",
)
def _(alone: Failing, found: Finding) -> None:
    target, disk = alone.target, alone.disk
    with disk.hanging():
        answers = [
            target.call("POST", "/llm/generate", body={"prompt": secrets.token_hex(8)}, timeout_s=10)
            for _ in range(CALLS)
        ]
        health = target.call("GET", "/health", timeout_s=5).status
        time.sleep(LAST_S)
    statuses = Counter(answer.status for answer in answers)
    ids = {answer.request_id for answer in answers}
    arrived = wait_for(lambda: ids <= target.mlflow.request_ids, 20)
    lost = [line for line in target.process.lines() if line["message"] == "Records of calls are lost"]
    found.say(f"{dict(statuses)}, {len(ids & target.mlflow.request_ids)} of {len(ids)} records")
    found.expect(statuses == {200: CALLS} and health == 200, f"{statuses}, /health {health}")
    found.expect(arrived, "records are missing")
    found.expect(not lost, "records are lost")
