"""Reports each change of keys, users and teams: who has changed what, and whom it concerns."""

import logging
from typing import Final, Literal

from service.telemetry.events import emit
from service.telemetry.names import EVENT_AUDIT

Action = Literal["key_created", "key_rotated", "key_revoked", "user_set", "team_set"]

COMMAND_LINE: Final = "command line"
"""Who has changed something by ``python -m service keys``: whoever may read the settings."""

logger = logging.getLogger(__name__)


def report_change(actor: str, action: Action, target: str, **details: str | None) -> None:
    """Write the audit line, which is an event of the request's span too.

    Args:
        actor: The name of the user who has made the change.
        action: What was done.
        target: The id of the key, or the name of the user or team.
        details: Further facts, without secrets; those that are None are left out.
    """
    fields = {name: value for name, value in details.items() if value is not None}
    emit(logger, EVENT_AUDIT, action, {"actor": actor, "action": action, "target": target, **fields})
