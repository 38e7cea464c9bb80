"""What of an upstream's reason for a refusal a caller may read.

A reason is shown whole or not at all. It is held back where it holds a secret, a piece of the prompt, or what
the models' side is made of: addresses, paths, stack traces.
"""

import html
import ipaddress
import pkgutil
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from inspect import isabstract
from itertools import pairwise
from typing import Any, Final
from urllib.parse import unquote

from detect_secrets import plugins
from detect_secrets.plugins.base import RegexBasedDetector
from publicsuffixlist import PublicSuffixList

MAX_REASON_CHARS: Final = 300
MAX_JUDGED_CHARS: Final = 2 * MAX_REASON_CHARS
"""How much is judged: a secret that the end of the reason cuts in half is still seen to be one."""

ECHO_CHARS: Final = 16
"""A reason with so many characters in a row of the caller's text echoes the prompt."""

BLOCK_CHARS: Final = ECHO_CHARS // 2
"""So many characters in a row of a text contain a whole one of its blocks, if they are twice as many."""

MAX_CANDIDATES: Final = 5_000
MAX_VALUES: Final = 50_000
MAX_CONTAINERS: Final = 20_000
MAX_TEXT_CHARS: Final = 1_048_576
"""Limits of what is compared. Beyond them the reason is held back, as nobody knows whether it echoes."""

MESSAGES: Final = frozenset({"messages", "input", "prompt", "instructions", "system", "prediction"})
"""The fields of a request that hold what was said. The others hold parameters and tools, whose values are
often a part of the reason, as in "Invalid value: 'foo'"."""

NO_TEXT: Final = frozenset({"role", "type", "data", "file_data"})
DATA_URL: Final = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")
NAMES: Final = frozenset({"name", "id", "tool_call_id", "call_id"})
IDENTIFIER: Final = re.compile(r"[\w.-]{1,64}")
"""A value under one of ``NAMES`` that is an identifier, such as a tool's name, is no text either."""

GENERAL: Final = "The model refused the request"
PLAIN_NAME: Final = re.compile(r"[a-z][a-z0-9_.\[\]]{0,63}")
PREFIXES: Final = re.compile(r"^(/[\w/]+: |litellm\.\w+: |(\w+Exception )?\w+(Error|Exception)( -|:) )+")

CODES: Final = frozenset(
    {
        *("account_deactivated", "access_terminated", "billing_hard_limit_reached", "billing_not_active"),
        *("insufficient_quota", "rate_limit_exceeded", "slow_down", "server_error", "engine_overloaded"),
        *("invalid_api_key", "invalid_organization", "organization_deactivated", "invalid_project"),
        *("unsupported_country_region_territory", "ip_not_authorized", "data_residency_mismatch"),
        *("model_not_found", "model_not_available", "unsupported_model", "previous_response_not_found"),
        *("context_length_exceeded", "tokens_exceeded", "max_tokens_exceeded", "request_too_large"),
        *("content_filter", "content_policy_violation", "bio_policy", "cyber_policy", "invalid_prompt"),
        *("misalignment_policy_violation", "image_content_policy_violation", "sanitizer_server_error"),
        *("invalid_type", "invalid_value", "invalid_parameter", "invalid_request", "invalid_json_schema"),
        *("unsupported_parameter", "unsupported_value", "unknown_parameter", "missing_required_parameter"),
        *("invalid_function_parameters", "invalid_language_format", "invalid_encoding", "parse_error"),
        *("integer_above_max_value", "integer_below_min_value", "invalid_base64", "duplicate_item"),
        *("decimal_above_max_value", "decimal_below_min_value", "empty_string", "empty_array"),
        *("string_above_max_length", "string_below_min_length", "array_above_max_length"),
        *("array_below_min_length", "unsupported_file", "unsupported_content_type", "vector_store_timeout"),
        *("invalid_image", "invalid_image_format", "invalid_image_url", "invalid_image_mode"),
        *("invalid_base64_image", "image_too_large", "image_too_small", "image_parse_error"),
        *("image_file_too_large", "image_file_not_found", "unsupported_image_media_type"),
        *("empty_image_file", "failed_to_download_image", "file_not_found", "invalid_file_format"),
    }
)
"""The codes of OpenAI's errors, which clients compare with; they say nothing about a prompt."""

REQUEST_FIELDS: Final = frozenset(
    {
        *(
            "model",
            "messages",
            "input",
            "prompt",
            "instructions",
            "stream",
            "stream_options",
            "include_usage",
        ),
        *(
            "tools",
            "tool_choice",
            "functions",
            "function_call",
            "function",
            "parameters",
            "parallel_tool_calls",
        ),
        *("response_format", "json_schema", "schema", "strict", "stop", "n", "max_tokens", "temperature"),
        *("max_completion_tokens", "max_output_tokens", "top_p", "top_k", "logit_bias", "logprobs"),
        *("top_logprobs", "user", "seed", "frequency_penalty", "presence_penalty", "reasoning_effort"),
        *(
            "reasoning",
            "effort",
            "summary",
            "verbosity",
            "modalities",
            "audio",
            "voice",
            "format",
            "prediction",
        ),
        *("store", "metadata", "service_tier", "web_search_options", "safety_identifier", "timeout"),
        *("prompt_cache_key", "prompt_cache_retention", "thinking", "budget_tokens", "dimensions"),
        *("encoding_format", "role", "content", "name", "type", "text", "image_url", "url", "detail"),
        *("input_audio", "data", "file", "file_data", "file_id", "filename", "refusal", "tool_calls", "id"),
        *("tool_call_id", "arguments", "description", "properties", "required", "include", "truncation"),
        *("previous_response_id", "max_tool_calls", "prediction"),
    }
)
"""The names of a request's fields in OpenAI's protocol, those of nested objects included."""

CREDENTIALS: Final = re.compile(
    r"bearer|basic |authorization|api[_ -]?key|\b(key|password|passwd|pwd|secret|token|signature)\s*[=:]"
    r"|\b(sk|pk|rk|gsk|xai|hf|r8|pplx|nvapi|tgp|fw|dop|shpat|org|proj|sess|whsec)[-_]\w{6}"
    r"|\b(glpat|gldt|gh[pousr]|github_pat|npm|pypi|xox\w|xapp|ya29|AIza)[-_.\w]\w|\barn:\w"
    r"|BEGIN [\w ]*(KEY|CERTIFICATE)",
    re.IGNORECASE,
)
INTERNALS: Final = re.compile(
    r"\w://|\S@\S|\bhost(name)?\b|\blocalhost\b|\.(py|js|go|rs|java)\b"  # URLs, mail addresses, files
    r"|(?<![\w./])/(?!v\d+/)[\w.-]{2}|(?<!\w)~/|\b[a-z]:\\|\\\\\w"  # absolute paths; /v1/… is an API's
    r"|traceback|, line \d+, in |\bfile \"| at 0x|\bat [\w.$<>]+\("  # stack traces
    r"|\b[a-z][a-z0-9-]*(\.[a-z0-9-]+)*:\d{2,5}\b"  # a host and its port
    r"|\b\d{1,3}(\.\d{1,3}){3}\b|\b([0-9a-f]{2}[:-]){5}[0-9a-f]{2}\b"  # IPv4 and MAC addresses
    r"|\bip(-\d{1,3}){4}\b",
    re.IGNORECASE,
)
IPV6: Final = re.compile(r"(?<![\w:.])[0-9a-f]*(?::[0-9a-f.]*){2,9}", re.IGNORECASE)
DOTTED: Final = re.compile(r"(?<![\w.\]\[])[a-z0-9-]+(?:\.[a-z0-9-]+)+(?![\w\[])", re.IGNORECASE)
INTERNAL_DOMAINS: Final = frozenset(
    {
        *("internal", "local", "localdomain", "lan", "corp", "home", "intra", "intranet", "private", "svc"),
        *("cluster", "consul", "onion", "arpa", "test", "example", "invalid", "prod", "staging", "k8s"),
    }
)
FIELDS: Final = frozenset({"name", "id", "tools", "audio", "data", "properties", "map"})
"""Top-level domains that are names of fields too: ``function.name`` is taken for a field."""

TOKEN: Final = re.compile(r"[A-Za-z0-9_+/=-]{16,}")
WINDOW: Final = 16
MAX_CHANGES: Final = 4
"""Changes between letters and digits, or from small to capital letters, within the window. A random text has
about seven, a model's name or an identifier up to four."""

ESCAPE: Final = re.compile(
    r"\\(?:u([0-9a-fA-F]{4})|U(000[0-9a-fA-F]{5}|0010[0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))"
)
CONTROLS: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
SPACES: Final = bytes.maketrans(b"\t\n\r\v\f", b"     ")
END: Final = "\0"
"""Stands between two texts; in a reason it is no printable character."""


class CallersText:
    """The text of a request's messages, in whichever field they are.

    Args:
        request: The request's body.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._too_many = False
        self._text = _normal(END.join(self._texts(request)))

    def is_echoed_in(self, said: str) -> bool:
        """Whether a text repeats ``ECHO_CHARS`` characters of the messages in a row."""
        if self._too_many:
            return True
        variants = {_normal(variant) for variant in _variants(said)}
        runs = {run for variant in variants for run in _slices(variant, ECHO_CHARS)}
        return bool(runs) and self._has_any(runs)

    def _has_any(self, runs: set[str]) -> bool:
        blocks = {block for run in runs for block in _slices(run, BLOCK_CHARS)}
        text, candidates = self._text, 0
        for at in range(0, len(text), BLOCK_CHARS):
            if text[at : at + BLOCK_CHARS] in blocks:
                candidates += 1
                around = text[max(0, at - BLOCK_CHARS) : at + 2 * BLOCK_CHARS]
                if candidates > MAX_CANDIDATES or not runs.isdisjoint(_slices(around, ECHO_CHARS)):
                    return True
        return False

    def _texts(self, request: Mapping[str, Any]) -> list[str]:
        texts: list[str] = []
        waiting: list[Any] = [[held for name, held in request.items() if name in MESSAGES]]
        values = 0
        for containers, value in enumerate(waiting):  # which grows meanwhile
            values += len(value)
            if values > MAX_VALUES or containers > MAX_CONTAINERS:
                self._too_many = True
                break
            inner = value
            if isinstance(value, dict):
                inner = [held for name, held in value.items() if not _is_a_name(name, held)]
            # Images and files in base64 are no text.
            texts += [held for held in inner if isinstance(held, str) and not DATA_URL.match(held)]
            waiting += [held for held in inner if isinstance(held, (dict, list))]
        if sum(map(len, texts)) > MAX_TEXT_CHARS:
            self._too_many = True
            return []
        return texts


def _is_a_name(name: str, held: object) -> bool:
    """Whether a field of a message holds a role, a type or a name, and no text."""
    return name in NO_TEXT or (
        name in NAMES and isinstance(held, str) and IDENTIFIER.fullmatch(held) is not None
    )


def reason_of(text: str, caller: CallersText) -> str:
    """The upstream's reason in one line; a general sentence if it may not be shown.

    Args:
        text: What the upstream says.
        caller: The request's texts.
    """
    first = text.strip().split("\n", 1)[0][: 2 * MAX_JUDGED_CHARS]
    said = PREFIXES.sub("", first)[:MAX_JUDGED_CHARS]
    line = "".join(char if char.isprintable() else " " for char in said)
    reason = line[:MAX_REASON_CHARS].strip()
    if not reason or shows_internals(line) or shows_secret(line) or caller.is_echoed_in(said):
        return f"{GENERAL}."
    return f"{GENERAL}: {reason}"


def plain_name(value: object, caller: CallersText) -> str | None:
    """A field's name or a code of the upstream's, as clients look for some; None for anything else."""
    if not isinstance(value, str) or not PLAIN_NAME.fullmatch(value):
        return None
    if value in CODES or _is_a_field(value):
        return value
    return None if shows_internals(value) or shows_secret(value) or caller.is_echoed_in(value) else value


def _is_a_field(path: str) -> bool:
    """Whether a text is the path of a field in OpenAI's protocol, such as ``messages[0].content``."""
    steps = [step for step in re.split(r"[.\[\]]+", path) if step]
    return all(step in REQUEST_FIELDS or step.isdecimal() for step in steps)


def shows_internals(text: str) -> bool:
    """Whether a text names an address, a host, a path or a line of code."""
    return (
        INTERNALS.search(text) is not None
        or any(map(_is_host, DOTTED.findall(text)))
        or any(map(_is_ipv6, IPV6.findall(text)))
    )


def shows_secret(text: str) -> bool:
    """Whether a text holds what a secret scanner reports, or a token that looks random."""
    return (
        CREDENTIALS.search(text) is not None
        or any(map(_looks_random, TOKEN.findall(text)))
        or any(pattern.search(text) for pattern in secret_patterns())
    )


def load_rules() -> None:
    """Read the rules from their packages, which takes a tenth of a second that no request should wait."""
    secret_patterns()
    public_suffixes()


@cache
def secret_patterns() -> tuple[re.Pattern[str], ...]:
    """The patterns of detect-secrets' plugins.

    The plugins themselves are not run: after a match some of them ask the provider whether it is a key.
    """
    found: list[re.Pattern[str]] = []
    for module in pkgutil.iter_modules(plugins.__path__, f"{plugins.__name__}."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, RegexBasedDetector) and not isabstract(value):
                found += value().denylist
    return tuple(dict.fromkeys(found))


@cache
def public_suffixes() -> PublicSuffixList:
    """The list of the domains under which hosts can be registered."""
    return PublicSuffixList(accept_unknown=False)


def _is_host(dotted: str) -> bool:
    labels = dotted.lower().split(".")
    last = labels[-1]
    if last in INTERNAL_DOMAINS:
        return True
    if last in FIELDS and all(label.isalpha() or label.isdigit() for label in labels):
        return False
    return public_suffixes().publicsuffix(last) is not None


def _is_ipv6(text: str) -> bool:
    address = text.rstrip(".")
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return address != "::"


def _looks_random(token: str) -> bool:
    changes = [_changes(*pair) for pair in pairwise(token)]
    return any(sum(changes[at : at + WINDOW - 1]) > MAX_CHANGES for at in range(len(token) - WINDOW + 1))


def _changes(one: str, next_one: str) -> bool:
    if one.isdigit() or next_one.isdigit():
        return one.isalpha() or next_one.isalpha()
    return one.islower() and next_one.isupper()


def _variants(said: str) -> Iterator[str]:
    """What is said, and what it says where it quotes with escapes: JSON's, Python's, HTML's or a URL's."""
    yield said
    yield html.unescape(said)
    yield unquote(said)
    for _ in range(2):
        said = ESCAPE.sub(_unescaped, said)
        # An emoji is escaped in two halves.
        yield said.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _unescaped(found: re.Match[str]) -> str:
    *numbers, other = found.groups()
    return CONTROLS.get(other, other) if other else chr(int(next(filter(None, numbers)), 16))


def _normal(text: str) -> str:
    """A text without the difference of small and capital letters of ASCII, and of kinds of white space.

    This is applied to whole requests. Bytes are put into small letters in a tenth of the time of a string.
    Half a surrogate pair becomes a question mark: to keep 170,000 of them would take 47 ms.
    """
    return text.encode("utf-8", "replace").lower().translate(SPACES).decode()


def _slices(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(len(text) - size + 1)]
