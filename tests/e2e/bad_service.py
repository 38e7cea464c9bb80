"""The service with routes that misbehave; run as a script in the place of ``python -m service``."""

import asyncio
import sys
import threading
import warnings
from typing import Any

from service import server
from service.__main__ import main

build = server.build


def with_bad_routes() -> Any:
    """The app, and more."""
    app = build()

    @app.get("/test/bug")
    async def bug() -> str:
        raise LookupError("a bug")

    @app.get("/test/warning")
    async def warn() -> str:
        warnings.warn("a warning\nin two lines", UserWarning, stacklevel=1)
        return "warned"

    @app.get("/test/forgotten")
    async def forget() -> str:
        task = asyncio.create_task(_fails())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task
        return "forgotten"

    @app.get("/test/thread")
    async def in_thread() -> str:
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        return "ended"

    @app.get("/test/finaliser")
    async def finaliser() -> str:
        _Unraisable()
        return "collected"

    return app


async def _fails() -> None:
    raise LookupError("nobody asks")


class _Unraisable:
    def __del__(self) -> None:
        raise LookupError("in a finaliser")


if __name__ == "__main__":
    server.build = with_bad_routes
    sys.exit(main())
