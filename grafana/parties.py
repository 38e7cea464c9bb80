"""The party responsible for each error, for the objectives and the dashboard "Whose fault is it?"."""

from typing import Final

from service import errors


def _names(*faults: errors.Fault) -> tuple[str, ...]:
    """Return the public error names that are these parties' to act on."""
    return tuple(error.__name__ for error in errors.PUBLIC_ERRORS if error.at_fault in faults)


PARTIES: Final = {
    "callers": _names(errors.Fault.CALLER),
    "the upstream": _names(errors.Fault.UPSTREAM),
    "us": _names(errors.Fault.SERVICE, errors.Fault.CACHE),
}
"""The errors of each party; a new error counts as ours unless its class is below another branch."""

FAILURES: Final = (*PARTIES["the upstream"], *PARTIES["us"])
"""The errors that use the availability budget."""
