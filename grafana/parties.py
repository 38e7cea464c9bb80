"""The party responsible for each error, for the objectives and the dashboard "Whose fault is it?"."""

from typing import Final

from service import errors


def _names(*classes: type[errors.ServiceError]) -> tuple[str, ...]:
    """Return the public error names below these branches of the error tree."""
    public = [error for error in errors.PUBLIC_ERRORS if issubclass(error, classes)]
    return tuple(error.__name__ for error in public)


PARTIES: Final = {
    "callers": _names(errors.CallerError),
    "the upstream": _names(errors.UpstreamFailure, errors.CircuitOpenError),
    "us": tuple(
        error.__name__
        for error in errors.PUBLIC_ERRORS
        if not issubclass(error, (errors.CallerError, errors.UpstreamFailure, errors.CircuitOpenError))
    ),
}
"""The errors of each party; a new error counts as ours unless its class is below another branch."""

FAILURES: Final = (*PARTIES["the upstream"], *PARTIES["us"])
"""The errors that use the availability budget."""
