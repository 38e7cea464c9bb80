"""The service on a disk that is read-only while a file exists; run in place of ``python -m service``.

A file system that becomes read-only cannot be had for a file that is open for writing. SQLite refuses each
statement that writes, as it does then, with the same error.
"""

import os
import sys
from pathlib import Path

import sqlalchemy as sa

from service.__main__ import main

SWITCH = Path(os.environ["READ_ONLY_SWITCH"])


@sa.event.listens_for(sa.Engine, "begin", insert=True)
def _begun(connection: sa.Connection) -> None:
    connection.exec_driver_sql(f"PRAGMA query_only={'ON' if SWITCH.exists() else 'OFF'}")


if __name__ == "__main__":
    sys.exit(main())
