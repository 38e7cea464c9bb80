"""The tree is the product page's table: names, statuses, advice."""

import re

import pytest

from service import errors
from service.errors import PUBLIC_ERRORS, CallerLeftError, ServiceError

TABLE = {
    "ValidationError": (422, False),
    "AuthenticationError": (401, False),
    "PermissionDeniedError": (403, False),
    "NotFoundError": (404, False),
    "MethodNotAllowedError": (405, False),
    "PayloadTooLargeError": (413, False),
    "UnsupportedMediaTypeError": (415, False),
    "RateLimitError": (429, True),
    "BudgetExceededError": (429, False),
    "BadRequestError": (400, False),
    "UpstreamTimeoutError": (504, True),
    "UpstreamError": (502, True),
    "RequestTimeoutError": (408, True),
    "CircuitOpenError": (503, True),
    "DependencyUnavailableError": (503, True),
    "OverloadedError": (503, True),
    "ShuttingDownError": (503, True),
    "InternalError": (500, False),
}


def _leaves(kind: type[ServiceError]) -> set[type[ServiceError]]:
    below = kind.__subclasses__()
    return set().union(*map(_leaves, below)) if below else {kind}


def test_what_a_caller_can_be_answered_with_is_the_table() -> None:
    assert {kind.__name__: (kind.status, kind.retry) for kind in PUBLIC_ERRORS} == TABLE


def test_every_error_of_the_tree_is_public_but_the_one_that_nobody_reads() -> None:
    assert _leaves(ServiceError) == {*PUBLIC_ERRORS, CallerLeftError}
    assert CallerLeftError.status == 499


def test_the_drawing_of_the_tree_is_true() -> None:
    drawn = dict(re.findall(r"── (\w+) +(\d{3}) ", errors.__doc__ or ""))
    assert drawn == {kind.__name__: str(kind.status) for kind in _leaves(ServiceError)}


@pytest.mark.parametrize("kind", [*PUBLIC_ERRORS, CallerLeftError])
def test_each_error_speaks_for_itself_in_whole_sentences(kind: type[ServiceError]) -> None:
    error = kind()
    assert error.name == kind.__name__
    assert error.message == str(error) == kind.default_message
    assert error.message != ServiceError.default_message
    assert error.message.endswith(".")
    assert error.retryable is kind.retry
    assert (error.retry_after_s, error.details) == (None, ())


def test_an_unread_body_closes_the_connection() -> None:
    closing = {kind.__name__ for kind in PUBLIC_ERRORS if kind().headers.get("Connection") == "close"}
    assert closing - {"ShuttingDownError"} == {"RequestTimeoutError", "PayloadTooLargeError"}


def test_two_errors_share_nothing() -> None:
    first, second = errors.NotFoundError(), errors.NotFoundError()
    first.headers["X"] = "y"
    assert second.headers == {}
