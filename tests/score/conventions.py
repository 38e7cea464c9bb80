"""The attributes of OpenTelemetry's semantic conventions, as the installed package has them."""

import ast
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from opentelemetry.semconv import _incubating, attributes

MOVED: Final = "Moved to the [OpenTelemetry GenAI semantic conventions repository]"
"""How the package says of an attribute that it is still one, and kept in another place."""

RESOURCE_NAMESPACES: Final = (
    *("service.", "process.", "host.", "os.", "container.", "k8s.", "cloud.", "deployment."),
    "telemetry.sdk.",
)
"""The namespaces of what sends telemetry, rather than of what happened."""


def _documented(folder: Path) -> Iterator[tuple[str, str]]:
    """Each constant of the modules in a folder, with the text below it."""
    for module in pkgutil.iter_modules([str(folder)]):
        body = ast.parse((folder / f"{module.name}.py").read_text(encoding="utf-8")).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Constant):
                continue
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = str(after.value.value)
            yield str(node.value.value), text.strip()


def _attributes() -> dict[str, str]:
    found: dict[str, str] = {}
    for folder in (Path(*_incubating.__path__, "attributes"), Path(*attributes.__path__)):
        found.update(_documented(folder))
    return found


ATTRIBUTES: Final = _attributes()
"""The keys of all attributes, and what the conventions say of each."""

DEPRECATED: Final = frozenset(
    key for key, text in ATTRIBUTES.items() if text.startswith("Deprecated:") and MOVED not in text
)
