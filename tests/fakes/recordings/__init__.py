"""Streams of Responses and Messages in the bytes in which an upstream sends them, one file each.

A file's name is ``<source>-<what>.<end>.sse``. The source is ``litellm`` for what the real LiteLLM proxy made
of a scripted provider (``record.py``), or ``written`` for what was written after the protocols' documentation
and the types of their libraries (``written.py``). The end is ``complete``, or ``cut`` where the stream just
ends, or ``failed-<error>`` where it says itself that it failed, or what follows cannot be read; the error is
this service's name for it.
"""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
PROTOCOLS = ("responses", "messages")


@dataclass(frozen=True)
class Recording:
    """One recorded stream.

    Args:
        protocol: The protocol, which is a folder's name.
        source: Where it came from.
        name: What it shows.
        end: ``complete``, ``cut`` or ``failed``.
        error: What a stream that failed says.
        content: The bytes.
    """

    protocol: str
    source: str
    name: str
    end: str
    error: str
    content: bytes

    def __str__(self) -> str:
        return f"{self.protocol}: {self.source}-{self.name}"


def recordings(protocol: str) -> list[Recording]:
    """The recordings of a protocol, in the order of their names."""
    return [_read(protocol, path) for path in sorted((FOLDER / protocol).glob("*.sse"))]


def _read(protocol: str, path: Path) -> Recording:
    stem, end = path.name.removesuffix(".sse").rsplit(".", 1)
    source, _, name = stem.partition("-")
    kind, _, error = end.partition("-")
    if source not in {"litellm", "written"} or kind not in {"complete", "cut", "failed"}:
        raise ValueError(f"{path.name} does not say where it came from, or how it ends")
    return Recording(protocol, source, name, kind, error, path.read_bytes())


def write(protocol: str, name: str, content: bytes) -> None:
    """Keep a recording under its name."""
    folder = FOLDER / protocol
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.sse").write_bytes(content)
