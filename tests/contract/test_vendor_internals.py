"""What this service relies on beyond the public interfaces of its libraries.

Each test fails when a library changes such a thing, and says where the service has to follow.
"""

import sqlite3
from pathlib import Path

import pytest
from qdrant_client import QdrantClient, models
from qdrant_client.local.qdrant_local import QdrantLocal

from service.cache.embedded import set_pragmas


def test_qdrant_local_storage(tmp_path: Path) -> None:
    see = "see set_pragmas in service/cache/embedded.py"
    client = QdrantClient(path=str(tmp_path))
    client.create_collection("answers", vectors_config={})
    local = getattr(client, "_client", None)
    if not isinstance(local, QdrantLocal):
        pytest.fail(f"qdrant_client changed where it keeps its local client; {see}")
    try:
        storage = local.collections["answers"].storage
        assert storage is not None
        connection = storage.storage
    except (AttributeError, AssertionError):
        pytest.fail(f"qdrant_client changed where a collection keeps its SQLite connection; {see}")
    assert isinstance(connection, sqlite3.Connection), f"qdrant_client changed its storage; {see}"
    set_pragmas(client)
    assert connection.execute("PRAGMA synchronous").fetchone() == (1,), (
        f"qdrant_client changed the connection that commits; {see}"
    )

    see = "see EmbeddedStore.delete in service/cache/embedded.py"
    ids = ["00000000-0000-0000-0000-000000000001"]
    client.upsert("answers", [models.PointStruct(id=ids[0], payload={"body": "secret"}, vector={})])
    client.overwrite_payload("answers", payload={}, points=list(ids))
    client.delete("answers", models.PointIdsList(points=list(ids)))
    assert local.collections["answers"].payload == [{}], (
        f"qdrant_client changed what it keeps of a deleted point; {see}"
    )
    client.close()
