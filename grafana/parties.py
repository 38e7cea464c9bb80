"""Whose fault each error is: what the objectives count, and what "Whose fault is it?" shows."""

from typing import Final

from service import errors


def _names(*classes: type[errors.ServiceError]) -> tuple[str, ...]:
    """The public names below these branches of the error tree."""
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
"""Whose fault each error is; an error that is added falls to us until its class says otherwise."""

FAILURES: Final = (*PARTIES["the upstream"], *PARTIES["us"])
"""What uses up the availability budget."""
