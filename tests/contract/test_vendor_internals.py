"""What this service relies on beyond the public interfaces of its libraries.

Each test fails when a library changes such a thing, and says where the service has to follow.
"""

import inspect
import socket
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


SEE_MLFLOW = "see service/recording/mlflow.py"


def test_mlflow() -> None:
    from mlflow.exceptions import MlflowException, RestException  # noqa: PLC0415 - takes most of a second
    from mlflow.tracing.constant import SpanAttributeKey  # noqa: PLC0415 - as above
    from mlflow.tracing.utils import otlp  # noqa: PLC0415 - as above
    from mlflow.utils.credentials import get_default_host_creds  # noqa: PLC0415 - as above
    from mlflow.utils.rest_utils import http_request  # noqa: PLC0415 - as above

    from service.recording import mlflow  # noqa: PLC0415 - as above

    taken = set(inspect.signature(http_request).parameters)
    used = {"host_creds", "endpoint", "method", "extra_headers", "max_retries", "timeout", "raise_on_status"}
    assert used | {"kwargs"} <= taken, f"mlflow changed http_request's parameters; {SEE_MLFLOW}"

    def failure(url: str, timeout_s: float) -> BaseException:
        # The SDK's functions have no types.
        host = get_default_host_creds(url)  # type: ignore[no-untyped-call]
        with pytest.raises(MlflowException) as raised:
            http_request(host, "/", "GET", max_retries=0, timeout=timeout_s)  # type: ignore[no-untyped-call]
        return raised.value

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert mlflow.is_timeout(failure(url, 0.2)), f"mlflow changed how it raises a timeout; {SEE_MLFLOW}"
    assert not mlflow.is_timeout(failure(url, 5)), f"mlflow changed how it raises a refusal; {SEE_MLFLOW}"

    answer = {"error_code": "INVALID_PARAMETER_VALUE", "message": ""}
    code = RestException(answer).error_code  # type: ignore[no-untyped-call]
    assert code in mlflow.ERRORS_BY_CODE, f"mlflow changed RestException.error_code; {SEE_MLFLOW}"

    ours = (mlflow.SPAN_TYPE, mlflow.INPUTS, mlflow.OUTPUTS, mlflow.COST, mlflow.TAG)
    theirs = (
        SpanAttributeKey.SPAN_TYPE,
        SpanAttributeKey.INPUTS,
        SpanAttributeKey.OUTPUTS,
        SpanAttributeKey.LLM_COST,
        SpanAttributeKey.TRACE_TAG_PREFIX,
    )
    assert ours == theirs, f"mlflow changed the names of span attributes; {SEE_MLFLOW}"
    headers = (otlp.MLFLOW_EXPERIMENT_ID_HEADER, otlp.MLFLOW_RUN_ID_HEADER)
    assert headers == (mlflow.EXPERIMENT_HEADER, mlflow.RUN_HEADER), f"mlflow changed headers; {SEE_MLFLOW}"
