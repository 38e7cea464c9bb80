"""Keys, users and teams at the routes: bad input, and much at once."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import pytest

from service.identity.keys import new_id, new_key
from tests.fakes.streams import DONE, Gate, GatedStream, chunk, text, usage
from tests.fakes.upstream import FakeUpstream
from tests.harness import Answer, AppUnderTest
from tests.http.streaming import calling
from tests.http.support import module_app

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def app(fake: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppUnderTest]:
    path = tmp_path_factory.mktemp("database") / "own.db"
    with module_app(litellm_url=fake.url, database_url=f"sqlite:///{path}") as served:
        yield served


@pytest.fixture(scope="module")
def admin(app: AppUnderTest) -> str:
    return app.token("admin")


def make(app: AppUnderTest, admin: str, **fields: Any) -> dict[str, Any]:
    answer = app.call("POST", "/keys", body={"name": "app", **fields}, token=admin)
    assert answer.status == 201, answer.body
    made: dict[str, Any] = answer.json
    return made


def chat(app: AppUnderTest, key: str) -> Answer:
    return app.call("POST", "/v1/chat/completions", body=CHAT, token=key)


@pytest.mark.parametrize("end", ["revoked", "disabled"])
def test_a_stream_ends_as_it_would_when_its_caller_is_shut_out(
    app: AppUnderTest, admin: str, fake: FakeUpstream, end: str
) -> None:
    owner = f"streaming-{end}"
    made = make(app, admin, owner=owner)
    gate = Gate()
    pieces = (text("a"), text("b"), chunk(reason="stop"), usage(), DONE)
    fake.script(GatedStream(pieces, gate))
    gate.allow()
    with calling(app, made["key"]) as caller:
        assert caller.status == 200
        assert b'"a"' in caller.event()
        if end == "revoked":
            assert app.call("DELETE", f"/keys/{made['id']}", token=admin).status == 204
        else:
            assert app.call("PUT", f"/users/{owner}", body={"disabled": True}, token=admin).status == 200
        refused = chat(app, made["key"])
        assert (refused.status, refused.json["error"]["type"]) == (401, "AuthenticationError")
        gate.allow(len(pieces) - 1)
        rest = caller.rest()
        assert b'"b"' in rest
        assert rest.endswith(DONE)
        assert b'"error"' not in rest
    # The call counts, though its key has ended.
    (row,) = app.call("GET", f"/usage?by=key&user={owner}", token=admin).json["rows"]
    assert (row["key"], row["calls"], row["errors"]) == (made["id"], 1, 0)
    assert row["completion_tokens"] == 20


def at_once(count: int, work: Any) -> list[Answer]:
    """Do the same in so many threads, which begin together."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> Answer:
        barrier.wait(30)
        answer: Answer = work(number)
        return answer

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def test_rotations_at_once_leave_one_secret(app: AppUnderTest, admin: str) -> None:
    made = make(app, admin)
    path = f"/keys/{made['id']}/rotate"
    turned = at_once(2, lambda _number: app.call("POST", path, token=admin))
    assert [answer.status for answer in turned] == [201, 201]
    statuses = [chat(app, answer.json["key"]).status for answer in turned]
    assert sorted(statuses) == [200, 401]
    assert chat(app, made["key"]).status == 401


def test_a_hundred_keys_are_made_at_once(app: AppUnderTest, admin: str) -> None:
    body = {"name": "é" * 256, "owner": "hundred"}
    answers = at_once(100, lambda _number: app.call("POST", "/keys", body=body, token=admin))
    assert [answer.status for answer in answers] == [201] * 100
    assert len({answer.json["key"] for answer in answers}) == 100
    listed: list[dict[str, Any]] = []
    while True:
        after = listed[-1]["id"] if listed else ""
        page = app.call("GET", f"/keys?owner=hundred&limit=30&after={after}", token=admin).json["keys"]
        if not page:
            break
        listed += page
    assert [key["id"] for key in listed] == sorted(answer.json["id"] for answer in answers)
    assert [chat(app, answer.json["key"]).status for answer in answers[:5]] == [200] * 5


@pytest.mark.parametrize(
    ("method", "path", "fields"),
    [
        ("POST", "/keys", b'{"name":"%s"}'),
        ("POST", "/keys", b'{"name":"x","owner":"%s"}'),
        ("POST", "/keys", b'{"name":"x","team":"%s"}'),
        ("POST", "/keys", b'{"name":"x","models":["%s"]}'),
        ("PUT", "/users/hostile", b'{"team":"%s"}'),
        ("PUT", "/users/hostile", b'{"models":["%s"]}'),
        ("PUT", "/teams/hostile", b'{"models":["%s"]}'),
    ],
)
def test_names_that_no_database_takes_are_refused(
    app: AppUnderTest, admin: str, method: str, path: str, fields: bytes
) -> None:
    for name in (rb"a\u0000b", rb"\ud800", rb"\udfff", rb"\ude00\ud83d", rb"\u0085", rb"a\nb", rb"\u202e"):
        answer = app.call(method, path, body=fields % name, token=admin)
        assert (answer.status, answer.json["error"]) == (422, "ValidationError"), name
    # Bytes that are no UTF-8.
    for name in (b"\xed\xa0\x80", b"\xff", b"\xc0\x80", b"\0"):
        assert app.call(method, path, body=fields % name, token=admin).status == 422, name
    # A model's name is plain; any other may be of any letters.
    plain = b"models" in fields
    answer = app.call(method, path, body=fields % b"\xf0\x9f\x98\x80", token=admin)
    assert answer.status in ({422} if plain else {200, 201})


def announce(app: AppUnderTest, method: str, path: str, token: str, body_bytes: int) -> int:
    """Send a request's head, and none of the body that it announces; the status."""
    with closing(HTTPConnection("127.0.0.1", app.port, timeout=10)) as connection:
        connection.putrequest(method, path)
        for name, value in (
            ("Authorization", f"Bearer {token}"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(body_bytes)),
        ):
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse().status


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/keys"), ("PUT", "/users/hostile"), ("PUT", "/teams/hostile")]
)
def test_names_of_ten_megabytes_are_refused_unread(
    app: AppUnderTest, admin: str, method: str, path: str
) -> None:
    assert announce(app, method, path, admin, 10_000_000) == 413
    # Who may not call is told so before a body is there that could be read.
    assert announce(app, method, path, new_key(new_id()), 1_000) == 401


@pytest.mark.parametrize("escape", ["%00", "%0A", "%E2%80%AE"])
def test_names_in_paths_and_queries_are_refused_too(app: AppUnderTest, admin: str, escape: str) -> None:
    for path in ("teams", "users"):
        assert app.call("PUT", f"/{path}/a{escape}b", body={}, token=admin).status in {400, 404, 422}
    for query in ("owner", "team", "after"):
        assert app.call("GET", f"/keys?{query}=a{escape}b", token=admin).status in {400, 422}


@pytest.mark.parametrize("escape", ["%00", "%ED%A0%80", "%FF", "%C0%80", "%0A", "%E2%80%AE"])
def test_no_name_is_an_error_of_the_service(app: AppUnderTest, admin: str, escape: str) -> None:
    name = f"a{escape}b"
    for method, path in (
        *(("PUT", f"/{path}/{name}") for path in ("teams", "users")),
        *(("GET", f"/keys?{query}={name}") for query in ("owner", "team", "after")),
        *(("GET", f"/{path}?after={name}") for path in ("teams", "users")),
        ("GET", f"/usage?user={name}"),
        ("DELETE", f"/keys/{name}"),
        ("POST", f"/keys/{name}/rotate"),
    ):
        body: dict[str, str] | None = {} if method == "PUT" else None
        assert app.call(method, path, body=body, token=admin).status < 500, (method, path)
