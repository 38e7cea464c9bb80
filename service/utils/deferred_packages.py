"""Packages of libraries whose ``__init__`` runs when something of it is asked for.

Python runs the ``__init__`` of a package before any module below it. Some libraries import all that they have
there: hundreds of modules, most of which a process never uses. Of a deferred package only those modules are
loaded that somebody imports. The first name that is asked of it and is no module below it runs its
``__init__``, so that whoever uses the package finds all of it.

The standard library's ``LazyLoader`` is no substitute: it runs ``__init__`` before it imports a module below.
"""

import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

DEFERRED = "__deferred__"

ASKED_BY_IMPORTS = frozenset({"__all__", "__version__"})
"""Names with underscores that are a reason to run ``__init__``; tools ask every module for others."""


def defer_packages(*names: str) -> None:
    """Defer these packages, and the packages below them, where they are not imported yet."""
    sys.meta_path.insert(0, _Finder(names))


class _Finder(MetaPathFinder):
    """Finds packages where Python would, and gives them a loader that defers."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._prefixes = tuple(f"{name}." for name in names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a package that is deferred; None for everything else."""
        if fullname not in self._names and not fullname.startswith(self._prefixes):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None and spec.submodule_search_locations is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Makes the package, and runs its ``__init__`` when it is asked to.

    Args:
        loader: Python's own.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        # One thread runs it, and may ask for more meanwhile; others wait for it.
        self._lock = threading.RLock()
        self._started = False

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The package, with nothing in it."""
        return _Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Only say who is to run it."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__dict__[DEFERRED] = self

    def run(self, package: ModuleType) -> None:
        """Run ``__init__``, once."""
        with self._lock:
            if self._started:
                return
            self._started = True
            try:
                self._loader.exec_module(package)
            except BaseException:
                # As with any import: the next one tries again.
                self._started = False
                raise
            package.__class__ = ModuleType


class _Package(ModuleType):
    """A package whose ``__init__`` has not been run to its end."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - of a module
        """Import the module of this name; where there is none, run ``__init__`` and look there."""
        special = name.startswith("__")
        if not special and PathFinder.find_spec(below := f"{self.__name__}.{name}", self.__path__):
            return import_module(below)
        if not special or name in ASKED_BY_IMPORTS:
            self.__dict__[DEFERRED].run(self)
            if name in self.__dict__:
                return self.__dict__[name]
            if type(self) is ModuleType:
                # The package's own ``__getattr__``.
                return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
