"""Reads and validates the configuration, and reports all of its problems at once.

``read_settings`` returns the settings or the problems. The rules for secrets refuse values that are published
as defaults or examples, too short, guessable, or damaged by the quoting of a shell.
"""

import ipaddress
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import argon2
from limits import parse_many as parse_limits
from pydantic import SecretStr
from pydantic import ValidationError as PydanticError

from service.config.secret_strength import is_guessable
from service.config.settings import PASSED_THROUGH, Settings, variable_names
from service.config.valkey_url import HOST, parse_valkey_url

REQUIRED = ("JWT_SECRET_KEY", "AUTH_ADMIN_PASSWORD", "AUTH_USER_PASSWORD")
LONG_NAME_CHARS = 8
ORIGIN = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)(:[0-9]{1,5})?")

JWT_PROBLEM = "JWT_SECRET_KEY must be set and different from default"
MIN_SECRET_BYTES = 32
MIN_SECRET_DISTINCT = 8
MIN_PASSWORD_CHARS = 8
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
OPEN_TO_OTHERS = stat.S_IRWXG | stat.S_IRWXO
DATABASE_URL = re.compile(
    r"sqlite://(?:/(?P<path>[^?#]+))?|postgres(?:ql)?(?:\+psycopg)?://[^\s/?#]*/[^\s/?#]+(?:\?\S*)?"
)
NARROWEST_WARNED = {4: 24, 6: 64}
"""Length of the prefix, by the version of IP, below which a trusted network is warned about."""

MAX_ISSUERS = 20
MAX_ISSUER_CHARS = 200
"""The name of an issuer's user holds the issuer, and has at most 256 characters."""

MAX_REPEATS_CHARS = 1_024
"""Number of characters in which a repetition is looked for, which takes quadratic time."""

PUBLISHED_SECRETS = frozenset(
    {
        # FastAPI's security tutorial, jwt.io's front page, and the literals of widely copied examples.
        "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
        "a-string-secret-at-least-256-bits-long",
        "your-256-bit-secret",
        "django-insecure-key",
        "super-secret-jwt-token-with-at-least-32-characters-long",
        "thisisasecretkeythatshouldbechanged",
    }
)
PLACEHOLDER = re.compile(
    r"change(me|this|it|in|before)|replace(me|this|with|in)|your(super|own|jwt|very|app)?secret|placeholder|"
    r"(my|super|default)secret|^todo|insecure|donotuse|notforproduction|^<.*>$"
)
PUBLISHED_PASSWORDS = frozenset(
    {
        "admin",
        "admin123",
        "administrator",
        "adminadmin",
        "adminpass",
        "adminpassword",
        "default",
        "letmein",
        "letmein123",
        "password",
        "password1",
        "password123",
        "passw0rd",
        "p@ssw0rd",
        "qwerty",
        "qwerty123",
        "qwertyuiop",
        "root",
        "secret",
        "secret123",
        "secretpassword",
        "test",
        "test1234",
        "testtest",
        "user",
        "user123",
        "userpass",
        "userpassword",
        "useruser",
        "welcome",
        "welcome1",
        "12345678",
        "123456789",
        "1234567890",
    }
)
PER_PROCESS = (
    *("MAX_IN_FLIGHT", "MAX_IN_FLIGHT_PER_USER", "RATE_LIMIT"),
    *("LOGIN_FAILURES_PER_NAME", "LOGIN_FAILURES_PER_ADDRESS"),
    *("RETRY_BUDGET_RATIO", "RETRY_BUDGET_FLOOR", "BREAKER_FAILURE_THRESHOLD"),
    *("CACHE_MEMORY_BYTES", "CACHE_QUEUE_BYTES", "SPOOL_MAX_BYTES"),
)
"""Limits that each worker process counts by itself."""

SHARED = ("RATE_LIMIT", "LOGIN_FAILURES_PER_NAME", "LOGIN_FAILURES_PER_ADDRESS")
"""Those of them that all processes count together where ``VALKEY_URL`` is set."""

ARGON2_HASH = re.compile(r"\$argon2(id|i|d)\$v=\d+\$m=\d+,t=\d+,p=\d+\$[A-Za-z0-9+/]+\$[A-Za-z0-9+/]+")
ARGON2_HASH_SIZES = frozenset({16, 20, 24, 32, 48, 64})
SIGNAL_PATH = re.compile(r"(/v1/(traces|metrics|logs))/*$")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
STRIPPED_HASH = re.compile(r"=\d+=\d+,t=\d+,p=\d+")
"""An argon2 hash after a shell, or compose, has expanded its ``$`` parts as variables."""


@dataclass(frozen=True)
class Report:
    """The result of reading the configuration; ``settings`` is None when there are errors."""

    settings: Settings | None
    errors: tuple[str, ...]
    warnings: tuple[str, ...]


def read_settings(is_guessable: Callable[[str], bool] = is_guessable) -> Report:
    """Read and validate the configuration. An invalid configuration is reported, not raised.

    Args:
        is_guessable: Whether a person could have thought of a secret.
    """
    try:
        settings, refused, errors = _read()
        warnings = (*_near_misses(variable_names()), *_risks(settings))
    except (OSError, UnicodeDecodeError) as error:
        return Report(None, (f".env cannot be read: {type(error).__name__}. Make it a UTF-8 file.",), ())
    errors += [message for name, message in problems(settings, is_guessable) if name not in refused]
    # The signing key's problems come first, the others in the order of the settings.
    errors.sort(key=lambda message: not message.startswith("JWT_SECRET_KEY"))
    return Report(None if errors else settings, tuple(errors), warnings)


def _read() -> tuple[Settings, set[str], list[str]]:
    try:
        return Settings(), set(), []
    except PydanticError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
    refused = {str(entry["loc"][0]) for entry in found}
    errors = [f"{str(entry['loc'][0]).upper()} is not valid: {_sentence(entry['msg'])}" for entry in found]
    # Refused fields get their defaults, so that the remaining checks run in the same pass.
    defaults = {name: Settings.model_fields[name].get_default(call_default_factory=True) for name in refused}
    return Settings(**defaults), {name.upper() for name in refused}, list(dict.fromkeys(errors))


def _sentence(text: str) -> str:
    return f"{text[:1].lower()}{text[1:]}."


def problems(
    settings: Settings, is_guessable: Callable[[str], bool] = is_guessable
) -> Iterator[tuple[str, str]]:
    """Yield each problem as the variable's name and a sentence that says what to do."""
    for name, value in settings:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if isinstance(text, str) and not _is_utf8(text):
            yield name.upper(), f"{name.upper()} is not valid: it must be UTF-8 text."
    yield from _signing_key_problems(settings.jwt_secret_key, is_guessable)
    yield from _password_problems("AUTH_ADMIN_PASSWORD", settings.auth_admin_password)
    yield from _password_problems("AUTH_USER_PASSWORD", settings.auth_user_password)
    yield from _equal_passwords(settings)
    if not re.fullmatch(r"[\x21-\x7e]*", settings.litellm_api_key.get_secret_value()):
        yield (
            "LITELLM_API_KEY",
            (
                "LITELLM_API_KEY contains a space, a line end or a character beyond ASCII: "
                "a header cannot carry it."
            ),
        )
    yield from _origin_problems(settings.cors_origins)
    yield from _proxy_problems(settings)
    for name, value in (
        ("LITELLM_URL", settings.litellm_url),
        ("QDRANT_URL", settings.qdrant_url),
        ("MLFLOW_TRACKING_URI", settings.mlflow_tracking_uri),
        ("MLFLOW_UI_URL", settings.mlflow_ui_url),
        ("GRAFANA_URL", settings.grafana_url),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", settings.otel_exporter_otlp_endpoint),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", settings.otel_exporter_otlp_traces_endpoint),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", settings.otel_exporter_otlp_metrics_endpoint),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", settings.otel_exporter_otlp_logs_endpoint),
    ):
        yield from _url_problems(name, value)
    signal = SIGNAL_PATH.search(settings.otel_exporter_otlp_endpoint)
    if signal is not None:
        yield (
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            (
                f"OTEL_EXPORTER_OTLP_ENDPOINT must not end in {signal[1]}: each signal's path is appended to "
                f"it. Remove it, or set OTEL_EXPORTER_OTLP_{signal[2].upper()}_ENDPOINT."
            ),
        )
    for name, value in (
        ("LOGIN_FAILURES_PER_NAME", settings.login_failures_per_name),
        ("LOGIN_FAILURES_PER_ADDRESS", settings.login_failures_per_address),
        ("RATE_LIMIT", settings.rate_limit),
    ):
        yield from _rate_problems(name, value)
    # A default is lowered to fit a shorter deadline; a value that was set must be valid as it is.
    chosen = "llm_connect_timeout_s" in settings.model_fields_set
    if chosen and settings.llm_connect_timeout_s >= settings.llm_timeout_s:
        yield (
            "LLM_CONNECT_TIMEOUT_S",
            (
                f"LLM_CONNECT_TIMEOUT_S ({settings.llm_connect_timeout_s:g}) must be less than "
                f"LLM_TIMEOUT_S ({settings.llm_timeout_s:g}): connecting is a part of the call."
            ),
        )
    yield from _stream_problems(settings)
    if settings.health_interval_s + settings.health_timeout_s > settings.health_ttl_s:
        yield (
            "HEALTH_TTL_S",
            (
                f"HEALTH_TTL_S ({settings.health_ttl_s:g}) must be at least HEALTH_INTERVAL_S plus "
                f"HEALTH_TIMEOUT_S ({settings.health_interval_s + settings.health_timeout_s:g}): a result "
                "must stay valid until the next one."
            ),
        )
    if settings.shutdown_grace_s > settings.shutdown_timeout_s:
        yield (
            "SHUTDOWN_GRACE_S",
            (
                f"SHUTDOWN_GRACE_S ({settings.shutdown_grace_s:g}) must not be more than SHUTDOWN_TIMEOUT_S "
                f"({settings.shutdown_timeout_s:g}): it is a part of it."
            ),
        )
    yield from _oidc_problems(settings)
    yield from _store_problems(settings)
    yield from _database_problems(settings)
    yield from _spool_problems(settings)
    yield from _valkey_problems(settings)


def _is_utf8(text: str) -> bool:
    """Whether the text can be encoded; Python decodes other bytes of the environment as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _signing_key_problems(
    secret: SecretStr, is_guessable: Callable[[str], bool]
) -> Iterator[tuple[str, str]]:
    """Yield each problem of the signing key, as the variable's name and a sentence."""
    value = secret.get_secret_value()
    how = "Make one with: openssl rand -hex 32"
    reason = ""
    if not _is_utf8(value):
        return
    if (
        not value.strip()
        or value.strip().lower() in PUBLISHED_SECRETS
        or PLACEHOLDER.search(_normalized(value))
    ):
        yield "JWT_SECRET_KEY", JWT_PROBLEM
        return
    if (size := len(value.encode())) < MIN_SECRET_BYTES:
        reason = f"it is {size} bytes long and needs at least {MIN_SECRET_BYTES}"
    elif _repeats(value) or len(set(value)) < MIN_SECRET_DISTINCT:
        reason = "it repeats one pattern"
    elif is_guessable(value):
        reason = "it consists of words or patterns that can be guessed"
    if reason:
        yield "JWT_SECRET_KEY", f"{JWT_PROBLEM}: {reason}. {how}"


def _normalized(value: str) -> str:
    return re.sub(r"[-_ .]", "", value.lower())


def _repeats(value: str) -> bool:
    """Whether the value repeats a shorter string; the last repetition may be incomplete."""
    value = value[:MAX_REPEATS_CHARS]
    return any(
        value == (value[:size] * (len(value) // size + 1))[: len(value)]
        for size in range(1, len(value) // 2 + 1)
    )


def _is_hash(value: str) -> bool:
    """Whether the value is a complete argon2 hash; a digest of an unusual length was truncated."""
    try:
        parameters = argon2.extract_parameters(value)
    except argon2.exceptions.InvalidHashError:
        return False
    return bool(ARGON2_HASH.fullmatch(value)) and parameters.hash_len in ARGON2_HASH_SIZES


def _password_problems(name: str, secret: SecretStr) -> Iterator[tuple[str, str]]:
    """Yield each problem of a password, as the variable's name and a sentence."""
    value = secret.get_secret_value()
    if STRIPPED_HASH.match(value):
        yield name, f"{name} is an argon2 hash without its $ parts. Put it in single quotes in a shell."
    elif not value.strip():
        yield name, f"{name} must be set: a password of your own, or its argon2 hash."
    elif value.startswith("$argon2"):
        if not _is_hash(value):
            yield name, f"{name} is not a complete argon2 hash. Put it in single quotes in a shell."
    elif CONTROL.search(value):
        yield name, f"{name} contains a line end or another control character, which nobody can type."
    elif value.strip().lower() in PUBLISHED_PASSWORDS or PLACEHOLDER.search(_normalized(value)):
        yield name, f"{name} must be different from published defaults: choose a password of your own."
    elif len(value) < MIN_PASSWORD_CHARS:
        yield name, f"{name} is too short: it needs at least {MIN_PASSWORD_CHARS} characters."


def _equal_passwords(settings: Settings) -> Iterator[tuple[str, str]]:
    """Check that the users have different passwords.

    Two hashes of one password differ by their salt, so that only the comparison with a plain one is complete.
    """
    admin = settings.auth_admin_password.get_secret_value()
    user = settings.auth_user_password.get_secret_value()
    if admin.strip() and _is_utf8(admin) and _is_utf8(user) and _same_password(admin, user):
        yield (
            "AUTH_USER_PASSWORD",
            "AUTH_USER_PASSWORD must be different from AUTH_ADMIN_PASSWORD: give each user one of their own.",
        )


def _same_password(first: str, second: str) -> bool:
    if first == second:
        return True
    for hashed, plain in ((first, second), (second, first)):
        if _is_hash(hashed) and not plain.startswith("$argon2"):
            try:
                return argon2.PasswordHasher().verify(hashed, plain)
            except argon2.exceptions.VerificationError:
                return False
    return False


def _oidc_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """Check the issuers, and what their tokens are compared with."""
    issuers = settings.oidc_issuers
    for issuer in issuers:
        if problem := _issuer_problem(issuer):
            yield "OIDC_ISSUERS", f"OIDC_ISSUERS has an entry that {problem}"
    if len(set(issuers)) < len(issuers):
        yield "OIDC_ISSUERS", "OIDC_ISSUERS names an issuer twice: list each once."
    if len(issuers) > MAX_ISSUERS:
        yield "OIDC_ISSUERS", f"OIDC_ISSUERS has {len(issuers)} entries; at most {MAX_ISSUERS} are allowed."
    if settings.jwt_issuer in issuers:
        yield (
            "JWT_ISSUER",
            "JWT_ISSUER must not be one of OIDC_ISSUERS: it names the tokens that this service signs itself.",
        )
    if issuers and not settings.oidc_audience:
        yield (
            "OIDC_AUDIENCE",
            (
                "OIDC_AUDIENCE must be set with OIDC_ISSUERS: the audience in tokens for this service. "
                "Without it, tokens for any other program would be accepted."
            ),
        )
    if bool(settings.oidc_admin_claim) != bool(settings.oidc_admin_values):
        missing = "OIDC_ADMIN_VALUES" if settings.oidc_admin_claim else "OIDC_ADMIN_CLAIM"
        yield missing, f"{missing} must be set too: OIDC_ADMIN_CLAIM and OIDC_ADMIN_VALUES need each other."


def _issuer_problem(issuer: str) -> str:
    """What is wrong with an issuer, as the end of a sentence; empty where nothing is."""
    if not _is_utf8(issuer) or next(_url_problems("OIDC_ISSUERS", issuer), None) is not None:
        # Not shown: it may hold a password.
        return (
            "is not the URL of an issuer: write it as the claim iss of its tokens has it, like "
            "https://login.example.org, without user name, password, query and fragment."
        )
    if len(issuer) > MAX_ISSUER_CHARS:
        return f"is longer than {MAX_ISSUER_CHARS} characters, which leaves no room for the name of a user."
    url = urlsplit(issuer)
    if url.scheme != "https" and not _is_loopback(url.hostname or ""):
        return f"is not https: {issuer[:80]!r}. Others on the way could replace its keys, and so sign tokens."
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _store_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """Check what the cache and its store require."""
    if settings.cache_semantic and not settings.embedding_model:
        yield (
            "EMBEDDING_MODEL",
            "EMBEDDING_MODEL must be set when CACHE_SEMANTIC is on: the model that makes the vectors.",
        )
    for name, number in (
        ("QDRANT_SHARD_NUMBER", settings.qdrant_shard_number),
        ("QDRANT_REPLICATION_FACTOR", settings.qdrant_replication_factor),
    ):
        if number and not settings.qdrant_url:
            yield name, f"{name} needs a Qdrant server: set QDRANT_URL. The embedded store has no shards."
    if settings.workers > 1 and not settings.qdrant_url:
        yield (
            "WORKERS",
            (
                f"WORKERS={settings.workers} needs a Qdrant server: set QDRANT_URL, or WORKERS=1. "
                "The embedded store's files belong to one process."
            ),
        )


def _spool_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """Check that nobody else can write to the spool: its records are sent to MLflow as the service's own.

    A folder that does not exist is created with the right mode, and one that cannot be looked at cannot be
    used either, which the recorder reports.
    """
    if not settings.mlflow_tracking_uri:
        return
    try:
        found = Path(settings.spool_path).stat()
    except (OSError, ValueError):
        return
    if found.st_uid != os.geteuid():
        yield (
            "SPOOL_PATH",
            (
                f"SPOOL_PATH belongs to another user ({found.st_uid}), who can write to it: give it to user "
                f"{os.geteuid()} of this process, or choose another folder."
            ),
        )
    elif found.st_mode & WRITABLE_BY_OTHERS:
        yield (
            "SPOOL_PATH",
            (
                f"SPOOL_PATH can be written to by others (mode {stat.S_IMODE(found.st_mode):04o}): "
                "run chmod 700 on the folder."
            ),
        )


def _database_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """Check the database's URL, and that nobody else can write to its file.

    The folder is not looked at: it may be a volume's, which belongs to a group.
    """
    value = settings.database_url.get_secret_value()
    found = DATABASE_URL.fullmatch(value)
    if found is None:
        yield (
            "DATABASE_URL",
            (
                "DATABASE_URL is not valid: write sqlite:///path for a file, or "
                "postgresql://user:password@host/database for a server."
            ),
        )
    elif value == "sqlite://" and settings.workers > 1:
        yield (
            "DATABASE_URL",
            (
                f"DATABASE_URL must name a file or a server when WORKERS is {settings.workers}: a database "
                "in memory belongs to one process."
            ),
        )
    elif found["path"]:
        yield from _private_file_problems("DATABASE_URL", Path(found["path"]))


def _valkey_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """Check the URL of the server that counts; it is not shown, as it may hold a password."""
    value = settings.valkey_url.get_secret_value()
    if not value or not _is_utf8(value):
        return
    try:
        parse_valkey_url(value)
    except ValueError as error:
        yield (
            "VALKEY_URL",
            (
                f"VALKEY_URL is not valid: {error}. Write valkey://user:password@host:port/database for one "
                "server, valkey+cluster://user:password@host:port,host:port for a cluster, or "
                "valkey+sentinel://user:password@host:port,host:port/service for sentinels; valkeys instead "
                "of valkey for TLS; redis and rediss mean the same. Special characters of a password are "
                "written as %XX."
            ),
        )


def _private_file_problems(name: str, path: Path) -> Iterator[tuple[str, str]]:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return
    if status.st_uid != os.geteuid():
        yield name, f"{name} names a file of another user ({status.st_uid}), who can write to it."
    elif status.st_mode & OPEN_TO_OTHERS:
        mode = stat.S_IMODE(status.st_mode)
        yield name, f"{name} names a file that others can use (mode {mode:04o}): run chmod 600 on it."


def _stream_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """Check the limits of a streamed answer against each other.

    Only values that were set are checked: a default is adapted to the others.
    """
    llm_s, whole_s = settings.llm_timeout_s, settings.stream_timeout_s
    chunk_s, keep_alive_s = settings.stream_chunk_timeout_s, settings.stream_keep_alive_s
    for name, value, fits, rule in (
        (
            "stream_timeout_s",
            whole_s,
            whole_s >= llm_s,
            f"at least LLM_TIMEOUT_S ({llm_s:g}): the first chunk may take that long",
        ),
        (
            "stream_chunk_timeout_s",
            chunk_s,
            chunk_s <= whole_s,
            f"at most STREAM_TIMEOUT_S ({whole_s:g}): it is a part of it",
        ),
        (
            "stream_keep_alive_s",
            keep_alive_s,
            keep_alive_s < chunk_s,
            f"less than STREAM_CHUNK_TIMEOUT_S ({chunk_s:g}): comments are sent within that time",
        ),
    ):
        if not fits and name in settings.model_fields_set:
            yield name.upper(), f"{name.upper()} ({value:g}) must be {rule}."


def _proxy_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    if "*" in _proxies(settings):
        yield (
            "FORWARDED_ALLOW_IPS",
            (
                "FORWARDED_ALLOW_IPS must not contain '*': every client could choose the address that is "
                "limited and logged. List the addresses of your proxies, separated by commas."
            ),
        )


def _proxies(settings: Settings) -> list[str]:
    return [entry.strip() for entry in settings.forwarded_allow_ips.split(",")]


def _risks(settings: Settings) -> Iterator[str]:
    """Yield a sentence for each value that is allowed, and that may do what the operator does not expect."""
    for entry in _proxies(settings):
        try:
            network = ipaddress.ip_network(entry, strict=False)
        except ValueError:
            continue
        if network.prefixlen < NARROWEST_WARNED[network.version]:
            yield (
                f"FORWARDED_ALLOW_IPS trusts {entry[:80]}, {network.num_addresses:,} addresses. Each can "
                "choose the client address that is limited and logged. List the addresses of your proxies."
            )
    if settings.workers > 1 and settings.qdrant_url:
        shared = SHARED if settings.valkey_url.get_secret_value() else ()
        names = ", ".join(name for name in PER_PROCESS if name not in shared)
        remedy = "" if shared else f" VALKEY_URL lets them count {', '.join(SHARED)} together."
        yield (
            f"WORKERS={settings.workers} processes count by themselves. All together allow up to "
            f"{settings.workers} times as much as these say: {names}.{remedy}"
        )


def _origin_problems(origins: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for origin in origins:
        if "*" in origin:
            yield "CORS_ORIGINS", "CORS_ORIGINS must not contain '*': list each origin, separated by commas."
        elif not _is_origin(origin):
            yield (
                "CORS_ORIGINS",
                (
                    f"CORS_ORIGINS has an entry that is not an origin: {origin[:80]!r}. Write "
                    "scheme://host[:port], with no path and no slash at the end."
                ),
            )


def _is_origin(origin: str) -> bool:
    try:
        url = urlsplit(origin)
        return bool(ORIGIN.fullmatch(origin) and HOST.fullmatch(url.hostname or "")) and url.port != 0
    except ValueError:
        return False


def _url_problems(name: str, value: str) -> Iterator[tuple[str, str]]:
    if not value and name != "LITELLM_URL":
        return
    try:
        url = urlsplit(value)
        valid = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
        valid = valid and bool(HOST.fullmatch(url.hostname or "")) and not re.search(r"[\s?#]", value)
    except ValueError:
        url, valid = None, False
    if not valid or url is None:
        yield name, f"{name} is not a URL: write http://host:port or https://host:port."
    elif "@" in url.netloc:
        yield name, f"{name} must not contain a user name or password: put the key in its own variable."


def _rate_problems(name: str, value: str) -> Iterator[tuple[str, str]]:
    try:
        rates = parse_limits(value)
        valid = len(rates) == 1 and rates[0].amount > 0 and rates[0].get_expiry() > 0
    except ValueError:
        valid = False
    if not valid:
        yield name, f"{name} is not a rate: write a number and a period, like 10/minute."


def _near_misses(names: set[str]) -> Iterator[str]:
    """Yield a sentence for each variable that looks like a misspelt setting."""
    known = {name.upper() for name in Settings.model_fields} | set(PASSED_THROUGH)
    for name in sorted(names):
        if name.upper() in known:
            continue
        # In a short name two letters make a different word: PATH is not a misspelt PORT.
        max_distance = 2 if len(name) >= LONG_NAME_CHARS else 1
        similar = [candidate for candidate in known if _may_be_near(name.upper(), candidate, max_distance)]
        if not similar:
            continue
        # Imported here, as most processes have no such variable and save 3 MB.
        from rapidfuzz.distance import OSA  # noqa: PLC0415 - as said

        distance, likely = min((OSA.distance(name.upper(), candidate), candidate) for candidate in similar)
        if distance <= max_distance:
            yield f"{name} is not a setting. Did you mean {likely}?"


def _may_be_near(name: str, candidate: str, max_distance: int) -> bool:
    """Whether so few edits may make one of the other: each adds and takes at most one character."""
    one, other = Counter(name), Counter(candidate)
    return max((one - other).total(), (other - one).total()) <= max_distance
