"""What the tests of the SQL stores share."""

import asyncio
from collections.abc import Awaitable, Callable

LIMIT_S = 60.0


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario, for a limited time."""

    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await scenario()

    asyncio.run(limited())
