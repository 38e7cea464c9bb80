"""What the standard server metrics say of an answer."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from opentelemetry.sdk.metrics.export import HistogramDataPoint

from service.errors import CircuitOpenError, OverloadedError
from tests.harness import AppUnderTest, running_app

DURATION = "http.server.request.duration"


def _eventually(condition: Callable[[], bool], limit_s: float = 10) -> None:
    """The metric comes after the answer, by a moment."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.005)


def _more_routes(app: FastAPI) -> None:
    async def breaker() -> None:
        raise CircuitOpenError(retry_after_s=3)

    async def overload() -> None:
        raise OverloadedError

    async def bug() -> None:
        raise ValueError

    for route in (breaker, overload, bug):
        app.add_api_route(f"/{route.__name__}", route)


@pytest.fixture(scope="module")
def service() -> Iterator[AppUnderTest]:
    with running_app(_more_routes) as app:
        yield app


@pytest.mark.parametrize(
    ("method", "path", "status", "error", "route"),
    [
        ("GET", "/nowhere", 404, "NotFoundError", None),
        ("PUT", "/auth/me", 405, "MethodNotAllowedError", None),
        ("GET", "/auth/me", 401, "AuthenticationError", "/auth/me"),
        ("POST", "/auth/login", 422, "ValidationError", "/auth/login"),
        ("GET", "/breaker", 503, "CircuitOpenError", "/breaker"),
        ("GET", "/overload", 503, "OverloadedError", "/overload"),
        ("GET", "/bug", 500, "InternalError", "/bug"),
    ],
)
def test_the_duration_has_the_errors_name(  # noqa: PLR0913, PLR0917 - a table with so many columns
    service: AppUnderTest, method: str, path: str, status: int, error: str, route: str | None
) -> None:
    wanted = {"error__type": error, "http__request__method": method}
    if route is not None:
        wanted["http__route"] = route
    before = service.value(DURATION, **wanted)
    answer = service.call(method, path)
    assert (answer.status, answer.json["error"]) == (status, error)
    _eventually(lambda: service.value(DURATION, **wanted) == before + 1)


def test_a_success_has_no_error(service: AppUnderTest) -> None:
    assert service.call("GET", "/openapi.json").status == 200

    def found() -> list[dict[str, Any]]:
        points = [dict(point.attributes or {}) for point in service.points(DURATION)]
        return [point for point in points if point["http.response.status_code"] == 200]

    _eventually(lambda: bool(found()))
    assert all("error.type" not in point for point in found())


def test_an_error_does_not_cling_to_the_next_request(service: AppUnderTest) -> None:
    before = service.value(DURATION)
    service.call("GET", "/breaker")
    service.call("GET", "/openapi.json")
    _eventually(lambda: service.value(DURATION) == before + 2)
    for point in service.points(DURATION):
        attributes = dict(point.attributes or {})
        assert ("error.type" in attributes) == (attributes["http.response.status_code"] != 200)


def test_the_duration_goes_to_two_minutes_in_seconds(service: AppUnderTest) -> None:
    service.call("GET", "/openapi.json")
    _eventually(lambda: service.value(DURATION) > 0)
    point = service.points(DURATION)[0]
    assert isinstance(point, HistogramDataPoint)
    assert point.explicit_bounds[-1] == 120
    assert point.sum < 30


def test_the_size_of_the_answer_is_left_out(service: AppUnderTest) -> None:
    service.call("GET", "/openapi.json")
    _eventually(lambda: service.value(DURATION) > 0)
    assert service.points("http.server.response.body.size") == []
    assert service.points("http.server.active_requests") != []


def test_no_attribute_names_a_user_an_id_or_a_full_path(service: AppUnderTest) -> None:
    service.call("GET", "/nowhere/canary-1?key=canary-2", headers={"X-Request-ID": "canary-3"})
    _eventually(lambda: service.value(DURATION, error__type="NotFoundError") > 0)
    for name in (DURATION, "http.server.active_requests", "http.server.request.body.size"):
        for point in service.points(name):
            assert "canary" not in str(dict(point.attributes or {}))
