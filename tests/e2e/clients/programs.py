"""The clients' programs: how each is built, what runs it, and which checks it has.

A program gets base URL and key from the environment, prints a line of JSON for each check that passed, and
ends with an exit status other than 0 when one did not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from tests.harness import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FOLDER: Final = Path(__file__).parent
LIMIT_S: Final = 100


class FailedError(Exception):
    """A program could not be built, or a check of it did not pass."""


@dataclass(frozen=True)
class Program(ABC):
    """One client's program.

    Args:
        name: The client's.
        source: The file that holds the checks, below this folder.
    """

    name: str
    source: str

    CHECK: ClassVar[str] = r'\bpassed\("(.+?)"\)'
    """Finds the names of the checks in the source."""
    NEEDS: ClassVar[tuple[str, ...]] = ()
    """The executables without which it cannot be built or run."""

    @property
    def path(self) -> Path:
        """The source's path."""
        return FOLDER / self.source

    @property
    def checks(self) -> list[str]:
        """The names of the checks, in the order in which they are run."""
        return re.findall(self.CHECK, self.path.read_text(), re.MULTILINE)

    @property
    def missing(self) -> list[str]:
        """What this machine has not got of what it needs."""
        return [program for program in self.NEEDS if shutil.which(program) is None]

    @property
    def excuse(self) -> str:
        """Why it is left out."""
        return f"Left out: {self.name}; it needs {' and '.join(self.missing)}."

    @abstractmethod
    def build(self, folder: Path) -> None:
        """Make what the command needs, in a folder that is kept between runs.

        Raises:
            FailedError: That went wrong.
        """

    @abstractmethod
    def command(self, folder: Path) -> Sequence[str]:
        """What runs it, once it is built."""

    @abstractmethod
    def version(self, folder: Path) -> str:
        """The client's version, once it is built; several for a program that tries several libraries."""

    def play(self, folder: Path, home: Path, environment: Mapping[str, str]) -> list[str]:
        """Run it in an empty folder, with nothing of the caller's environment; the checks that passed.

        Raises:
            FailedError: One did not.
        """
        ended = subprocess.run(
            self.command(folder),
            cwd=home,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(home),
                "PYTHONPATH": str(ROOT),
                # Of LiteLLM's library: no table of prices from the network.
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        if ended.returncode != 0:
            raise FailedError(f"exit status {ended.returncode}\n{ended.stdout}\n{ended.stderr}")
        # Libraries write to stdout too.
        lines = [line for line in ended.stdout.splitlines() if line.startswith('{"check"')]
        passed = [json.loads(line)["check"] for line in lines]
        if not passed or passed != self.checks:
            raise FailedError(f"{passed} passed, instead of {self.checks}")
        return passed


@dataclass(frozen=True)
class Python(Program):
    """A program in Python.

    Args:
        variable: Names the Python that has the libraries, or a program beside it; empty for the tests' own.
        packages: The libraries whose versions are told.
    """

    variable: str
    packages: tuple[str, ...]

    CHECK: ClassVar[str] = r'^@check\("(.+)"\)$'

    @property
    def python(self) -> str:
        """The Python that has the libraries."""
        if not self.variable:
            return sys.executable
        named = os.environ.get(self.variable)
        assert named, f"{self.variable} is not set; `make test` installs what it names and sets it"
        return str(Path(named).with_name("python"))

    def build(self, folder: Path) -> None:
        """The libraries are installed by make."""

    def command(self, folder: Path) -> Sequence[str]:  # noqa: ARG002 - there is nothing to build
        """Its Python, and the program."""
        return (self.python, str(self.path))

    def version(self, folder: Path) -> str:  # noqa: ARG002 - as above
        """What is installed beside its Python."""
        source = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
        command = [self.python, "-c", source, *self.packages]
        told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        return told.stdout.strip().replace(" ", ", ")


@dataclass(frozen=True)
class Node(Program):
    """A program in JavaScript.

    Args:
        packages: The libraries that it tries.
    """

    packages: tuple[str, ...]

    NEEDS: ClassVar[tuple[str, ...]] = ("node", "npm")

    def build(self, folder: Path) -> None:  # noqa: ARG002 - beside the program, where Node.js looks for them
        """The packages are installed by make."""
        if not (self.path.parent / "node_modules/.packages").is_file():
            raise FailedError("tests/e2e/clients/node/node_modules is not there; `make test` installs it")

    def command(self, folder: Path) -> Sequence[str]:  # noqa: ARG002 - as above
        """Node.js, and the program."""
        return ("node", str(self.path))

    def version(self, folder: Path) -> str:  # noqa: ARG002 - as above
        """What is locked."""
        return ", ".join(_npm_version(self.path.parent, package) for package in self.packages)


@dataclass(frozen=True)
class Agent(Program):
    """A coding agent from npm, driven by a program in Python.

    Args:
        package: The agent's.
    """

    package: str

    NEEDS: ClassVar[tuple[str, ...]] = ("node", "npm")

    def build(self, folder: Path) -> None:
        """Install the agents, unless these versions are there."""
        wanted = FOLDER / "agents/package-lock.json"
        # Written at the end of an installation.
        stamp = folder / "agents/installed.json"
        if stamp.is_file() and stamp.read_bytes() == wanted.read_bytes():
            return
        stamp.parent.mkdir(exist_ok=True)
        for name in ("package.json", "package-lock.json", ".npmrc"):
            shutil.copy(wanted.with_name(name), stamp.parent)
        # Their installation scripts do nothing but copy the binary that the package brings.
        options = ("--silent", "--no-audit", "--no-fund", "--ignore-scripts")
        _build(["npm", "ci", *options], stamp.parent)
        shutil.copy(wanted, stamp)

    def command(self, folder: Path) -> Sequence[str]:
        """The program, which is told where the agents are."""
        module = ".".join(self.path.relative_to(ROOT).with_suffix("").parts)
        return (sys.executable, "-m", module, str(folder / "agents"))

    def version(self, folder: Path) -> str:  # noqa: ARG002 - the lock names it
        """What is locked."""
        return _npm_version(self.path.parent, self.package)


class Go(Program):
    """The program in Go."""

    CHECK: ClassVar[str] = r'^\t\t\{"(.+)", \w+\},$'
    NEEDS: ClassVar[tuple[str, ...]] = ("go",)

    def build(self, folder: Path) -> None:
        """Compile it."""
        _build(["go", "build", "-trimpath", "-o", str(folder / "go-client"), "."], self.path.parent)

    def command(self, folder: Path) -> Sequence[str]:
        """The binary."""
        return (str(folder / "go-client"),)

    def version(self, folder: Path) -> str:  # noqa: ARG002 - the source names it
        """The version in go.mod."""
        return _found(r"openai-go/v3 v(\S+)", self.path.with_name("go.mod"))


class Rust(Program):
    """The program in Rust."""

    NEEDS: ClassVar[tuple[str, ...]] = ("cargo",)

    def build(self, folder: Path) -> None:
        """Compile a copy of it: cargo writes Cargo.lock beside the source."""
        copy = folder / "rust"
        shutil.copytree(FOLDER / "rust", copy, dirs_exist_ok=True)
        _build(["cargo", "build", "--quiet", "--target-dir", str(copy / "target")], copy)

    def command(self, folder: Path) -> Sequence[str]:
        """The binary."""
        return (str(folder / "rust/target/debug/clients"),)

    def version(self, folder: Path) -> str:  # noqa: ARG002 - the source names it
        """The version in Cargo.toml."""
        return _found(r'^async-openai = \{ version = "=(.+?)"', FOLDER / "rust/Cargo.toml")


class Java(Program):
    """The program in Java."""

    NEEDS: ClassVar[tuple[str, ...]] = ("java", "javac", "mvn")

    def build(self, folder: Path) -> None:
        """Fetch the libraries, and compile it."""
        jars, classes = folder / "java/jars", folder / "java/classes"
        # Libraries of an earlier version would stay.
        shutil.rmtree(folder / "java", ignore_errors=True)
        goal = ["dependency:copy-dependencies", f"-DoutputDirectory={jars}"]
        pom = self.path.with_name("pom.xml")
        _build(["mvn", "--quiet", "--batch-mode", "--file", str(pom), *goal], folder)
        _build(["javac", "-cp", f"{jars}/*", "-d", str(classes), str(self.path)], folder)

    def command(self, folder: Path) -> Sequence[str]:
        """Java, and where the program's classes are."""
        return ("java", "-cp", f"{folder}/java/jars/*:{folder}/java/classes", self.path.stem)

    def version(self, folder: Path) -> str:  # noqa: ARG002 - the source names it
        """The version in pom.xml."""
        return _found(
            r"<artifactId>openai-java</artifactId>\s*<version>(.+)</version>", self.path.with_name("pom.xml")
        )


def _build(command: Sequence[str], folder: Path) -> None:
    """Run a step of a build, with the caller's environment: it may say how the registries are reached."""
    ended = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if ended.returncode != 0:
        raise FailedError(f"{' '.join(command)}\n{ended.stdout}\n{ended.stderr}")


def _output(command: Sequence[str]) -> str:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    ).stdout


def _npm_version(folder: Path, package: str) -> str:
    locked = json.loads((folder / "package-lock.json").read_text())["packages"]
    found: str = locked[f"node_modules/{package}"]["version"]
    return found


def _found(pattern: str, path: Path) -> str:
    match = re.search(pattern, path.read_text(), re.MULTILINE)
    assert match is not None, f"{path} has no {pattern}"
    return match[1]


QUICK: Final[tuple[Program, ...]] = (
    Python("OpenAI Python", "python/openai_sdk.py", "", ("openai",)),
    Python("OpenAI Python, Azure's client", "python/azure_sdk.py", "", ("openai",)),
    Python("OpenAI Agents SDK", "python/agents_sdk.py", "CLIENTS_PYTHON", ("openai-agents",)),
    Python("Anthropic Python", "python/anthropic_sdk.py", "CLIENTS_PYTHON", ("anthropic",)),
    Python(
        "LangChain",
        "python/langchain_libraries.py",
        "CLIENTS_PYTHON",
        ("langchain-openai", "langchain-anthropic"),
    ),
    Python("Pydantic AI", "python/pydantic_ai_library.py", "CLIENTS_PYTHON", ("pydantic-ai-slim",)),
    Python(
        "LlamaIndex",
        "python/llama_index_library.py",
        "CLIENTS_OPENAI2_PYTHON",
        ("llama-index-llms-openai-like", "llama-index-embeddings-openai-like"),
    ),
    Python("instructor", "python/instructor_library.py", "CLIENTS_OPENAI2_PYTHON", ("instructor",)),
    Python("LiteLLM's SDK", "python/litellm_sdk.py", "LITELLM_BIN", ("litellm",)),
    Python("llm", "python/llm_command.py", "CLIENTS_PYTHON", ("llm",)),
    Node("OpenAI JavaScript", "node/openai_sdk.mjs", ("openai",)),
    Node("Anthropic JavaScript", "node/anthropic_sdk.mjs", ("@anthropic-ai/sdk",)),
    Node("Vercel AI SDK", "node/ai_sdk.mjs", ("ai", "@ai-sdk/openai", "@ai-sdk/anthropic")),
)
"""Those that need nothing but a package index: they are tried by ``make test``."""

BUILT: Final[tuple[Program, ...]] = (
    Go("openai-go", "go/main.go"),
    Rust("async-openai (Rust)", "rust/src/main.rs"),
    Java("openai-java", "java/Client.java"),
    Agent("Claude Code", "agents/claude_code.py", "@anthropic-ai/claude-code"),
    Agent("Codex", "agents/codex.py", "@openai/codex"),
)
"""Those that take minutes to build, or half a gigabyte."""


def in_ci() -> bool:
    """Whether nothing may be left out."""
    return bool(os.environ.get("CI"))
