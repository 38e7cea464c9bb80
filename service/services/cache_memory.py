"""The entries used last, in this process's memory: bounded in bytes, the longest unused goes first."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from service.services.cache_entry import Entry


@dataclass(slots=True)
class _Kept:
    entry: Entry
    seen_s: float


class EntryMemory:
    """Keeps entries by their digest.

    Args:
        max_bytes: What all of them may take together, roughly; 0 keeps none.
        trusted_s: Seconds for which the store is not asked whether the entry is still there; None where
            nobody else can have taken it out.
        now: Unix time in seconds.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        max_bytes: int,
        trusted_s: float | None,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._trusted_s = trusted_s
        self._now = now
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, digest: str, *, believed: bool = False) -> Entry | None:
        """The entry, unless it is too old or, not ``believed``, seen in the store too long ago."""
        kept = self._kept.get(digest)
        if kept is None:
            return None
        if kept.entry.expires_at <= self._now():
            self.discard(digest)
            return None
        if not believed and self._trusted_s is not None and self._clock() - kept.seen_s >= self._trusted_s:
            return None
        self._kept.move_to_end(digest)
        return kept.entry

    def put(self, entry: Entry) -> None:
        """Keep the entry, instead of the one with the same digest."""
        self.discard(entry.key.digest)
        if entry.size_bytes > self._max_bytes:
            return
        self._kept[entry.key.digest] = _Kept(entry, self._clock())
        self.size_bytes += entry.size_bytes
        while self.size_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.size_bytes -= oldest.entry.size_bytes

    def discard(self, digest: str) -> None:
        """Forget the entry, if it is here."""
        kept = self._kept.pop(digest, None)
        if kept is not None:
            self.size_bytes -= kept.entry.size_bytes

    def clear(self, *, tenant: str | None = None, model: str | None = None) -> int:
        """Forget all, or all of this tenant and model; how many that were."""
        gone = [
            digest
            for digest, kept in self._kept.items()
            if tenant in {None, kept.entry.key.tenant} and model in {None, kept.entry.model}
        ]
        for digest in gone:
            self.discard(digest)
        return len(gone)
