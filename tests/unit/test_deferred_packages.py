"""Packages whose ``__init__`` is run when something of it is asked for."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

FILES = {
    "large/__init__.py": """
        from large import costly
        from large.below import ANSWER
        __all__ = ["ANSWER", "costly"]
        VALUE = len(__all__)
        def __getattr__(name):
            if name == "late":
                return "made"
            raise AttributeError(name)
    """,
    "large/costly.py": "",
    "large/light.py": "from large import other; LIGHT = other.NAME",
    "large/other.py": "NAME = __name__",
    "large/below/__init__.py": "from large.costly import __name__ as ANSWER",
    "large/below/deep.py": "DEEP = 1",
    "broken/__init__.py": "raise ImportError('not now')",
    "broken/light.py": "LIGHT = 1",
}
BEGIN = """
import sys
from service.utils.deferred_packages import defer_packages

defer_packages("large", "broken")
"""


@pytest.fixture
def run(tmp_path: Path) -> "Run":
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    return Run(tmp_path)


class Run:
    """Runs programs in a process of their own, with the packages of ``FILES``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, program: str) -> str:
        """What the program printed."""
        path = [str(self._folder), str(Path(__file__).parents[2])]
        text = f"import sys\nsys.path[:0] = {path!r}\n{BEGIN}{textwrap.dedent(program)}"
        ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
        assert not ran.stderr, ran.stderr
        return ran.stdout.strip()


def test_a_module_below_is_imported_without_the_rest(run: Run) -> None:
    program = """
        import large.light, large.below.deep
        print(large.light.LIGHT, large.below.deep.DEEP, "large.costly" in sys.modules)
    """
    assert run(program) == "large.other 1 False"


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("from large import VALUE; print(VALUE)", "2"),
        ("import large; print(large.ANSWER)", "large.costly"),
        ("import large.light; from large import *; print(ANSWER)", "large.costly"),
        ("import large; print(large.late)", "made"),
        ("from large import costly; print(costly.__name__)", "large.costly"),
        ("import large; print(hasattr(large, 'nothing'))", "False"),
        ("import large; print(hasattr(large, '__wrapped__'), 'large.costly' in sys.modules)", "False False"),
        ("import importlib, large; importlib.reload(large); print(large.VALUE)", "2"),
        ("import inspect, large; print('VALUE' in inspect.getsource(large))", "True"),
    ],
)
def test_whoever_asks_the_package_finds_all_of_it(run: Run, asked: str, found: str) -> None:
    assert run(asked) == found


def test_an_init_that_fails_is_run_again_by_the_next_who_asks(run: Run) -> None:
    program = """
        import broken.light
        for _ in range(2):
            try:
                broken.value
            except ImportError as error:
                print(error, broken.light.LIGHT)
    """
    assert run(program) == "not now 1\nnot now 1"


def test_threads_that_ask_at_once_all_find_what_they_ask_for(run: Run) -> None:
    program = """
        import large, threading
        start, found = threading.Barrier(8), []
        def ask():
            start.wait()
            found.append(large.VALUE)
        threads = [threading.Thread(target=ask) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(found == [2] * 8)
    """
    assert run(program) == "True"
