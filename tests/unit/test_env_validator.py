"""What the validator refuses, value by value, and what its sentence tells the operator to do."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from service.config.settings import processors
from tests.unit.conftest import Read

JWT_LINE = "JWT_SECRET_KEY must be set and different from default"
GREEK = "αβγδεζηθικλμνξοπρστυφχψω"


def _greek(bytes_: int) -> str:
    """A secret of two bytes a character, closed with one byte where the size is odd."""
    letters = secrets.SystemRandom().sample(GREEK, bytes_ // 2)
    return "".join(letters) + "x" * (bytes_ % 2)


def test_a_configuration_of_secrets_alone_is_valid(read: Read) -> None:
    report = read()
    assert report.errors == ()
    assert report.settings is not None
    assert report.settings.port == 8000


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        " " * 40,
        "\t",
        "changeme",
        "CHANGE_ME",
        "change-this-secret-before-you-go-live",
        "please_change_it_0123456789abcdefghijk",
        "change-in-production-0123456789abcdef",
        "replace-with-a-secret-of-32-bytes-or-more",
        "REPLACE_ME_0123456789abcdefghijklmnop",
        "your-secret-key-0123456789abcdefghijk",
        "your_super_secret_0123456789abcdefghij",
        "your-own.secret 0123456789abcdefghijkl",
        "YOUR_JWT_SECRET_0123456789abcdefghijkl",
        "a placeholder of at least thirty-two bytes",
        "insecure-development-key-0123456789ab",
        "do-not-use-this-one-0123456789abcdefg",
        "not-for-production-0123456789abcdefghi",
        "<openssl rand -hex 32 goes in this place>",
        "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
        "09D25E094FAA6CA2556C818166B7A9563B93F7099F6F0F4CAA6CF63B88E8D3E7",
        "  09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7 ",
        "a-string-secret-at-least-256-bits-long",
        "your-256-bit-secret",
        "super-secret-jwt-token-with-at-least-32-characters-long",
        "thisisasecretkeythatshouldbechanged",
    ],
)
def test_a_default_or_absent_jwt_secret_is_refused(read: Read, value: str | None) -> None:
    report = read(JWT_SECRET_KEY=value)
    assert report.settings is None
    assert report.errors == (JWT_LINE,)


@pytest.mark.parametrize("size", [1, 8, 31])
def test_a_short_jwt_secret_is_refused_with_its_length(read: Read, size: int) -> None:
    (error,) = read(JWT_SECRET_KEY=secrets.token_hex(16)[:size]).errors
    assert error.startswith(f"{JWT_LINE}: it is {size} bytes long and needs at least 32.")
    assert error.endswith("openssl rand -hex 32")


@pytest.mark.parametrize(
    "value",
    [
        "a" * 32,
        "abc" * 11,
        "abcabc" * 20 + "ab",
        "0123456789" * 4,
        "0123456789abcdef" * 2,
        "correct-horse-12" * 2,
        "ab" * 15 + "cdefg",  # seven different characters
        " " * 31 + "x",
    ],
)
def test_a_jwt_secret_of_one_repeated_pattern_is_refused(read: Read, value: str) -> None:
    (error,) = read(JWT_SECRET_KEY=value).errors
    assert error == f"{JWT_LINE}: it repeats one pattern. Make one with: openssl rand -hex 32"


def test_a_random_piece_written_twice_is_refused(read: Read) -> None:
    (error,) = read(JWT_SECRET_KEY=secrets.token_hex(16) * 2).errors
    assert "it repeats one pattern" in error


def test_the_length_is_counted_in_bytes(read: Read) -> None:
    (error,) = read(JWT_SECRET_KEY=_greek(31)).errors
    assert "it is 31 bytes long" in error
    assert read(JWT_SECRET_KEY=_greek(32)).errors == ()


@pytest.mark.parametrize("make", [secrets.token_hex, secrets.token_urlsafe, _greek])
def test_random_jwt_secrets_are_accepted(read: Read, make: Callable[[int], str]) -> None:
    for _ in range(20):
        assert read(JWT_SECRET_KEY=make(32)).errors == ()


PASSWORDS = ["AUTH_ADMIN_PASSWORD", "AUTH_USER_PASSWORD"]


@pytest.mark.parametrize("name", PASSWORDS)
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "must be set: a password of your own, or its argon2 hash"),
        ("", "must be set: a password of your own, or its argon2 hash"),
        ("   ", "must be set: a password of your own, or its argon2 hash"),
        ("admin", "different from published defaults: choose a password of your own"),
        ("Admin123", "different from published defaults: choose a password of your own"),
        (" password123 ", "different from published defaults: choose a password of your own"),
        ("12345678", "different from published defaults: choose a password of your own"),
        ("changeme", "different from published defaults: choose a password of your own"),
        ("Change_Me_Now", "different from published defaults: choose a password of your own"),
        ("<your password>", "different from published defaults: choose a password of your own"),
        ("aZ5!xx9", "too short: it needs at least 8 characters"),
        ("$argon2id$v=19$broken", "is not a complete argon2 hash. Put it in single quotes"),
        ("$argon2", "is not a complete argon2 hash. Put it in single quotes"),
        ("cW5zJ4kd7fQ2\n", "contains a line end or another control character"),
        ("cW5zJ4\r\nkd7fQ2", "contains a line end or another control character"),
        ("cW5zJ4\tkd7fQ2\x7f", "contains a line end or another control character"),
    ],
)
def test_a_bad_password_is_refused(read: Read, name: str, value: str | None, sentence: str) -> None:
    (error,) = read(**{name: value}).errors
    assert error.startswith(f"{name} ")
    assert sentence in error


@pytest.mark.parametrize("name", PASSWORDS)
def test_a_password_of_ones_own_or_its_hash_is_accepted(
    read: Read, cheap_hash: Callable[[str], str], name: str
) -> None:
    password = secrets.token_hex(4)
    assert read(**{name: password}).errors == ()
    assert read(**{name: cheap_hash(password)}).errors == ()


@pytest.mark.parametrize(
    ("origins", "told"),
    [
        ("*", ["must not contain '*'"]),
        ("https://*.example.com", ["must not contain '*'"]),
        ("https://a.example/path", ["'https://a.example/path'"]),
        ("https://a.example/", ["'https://a.example/'"]),
        ("a.example", ["'a.example'"]),
        ("ftp://a.example", ["'ftp://a.example'"]),
        ("null", ["'null'"]),
        ("https://", ["'https://'"]),
        ("https://a.example:port", ["'https://a.example:port'"]),
        ("https://a.example?x=1", ["'https://a.example?x=1'"]),
        ("https://me@a.example", ["'https://me@a.example'"]),
        (
            "https://ok.example, *, b.example,https://c.example/",
            ["'*'", "'b.example'", "'https://c.example/'"],
        ),
    ],
)
def test_a_bad_origin_is_refused(read: Read, origins: str, told: list[str]) -> None:
    errors = read(CORS_ORIGINS=origins).errors
    assert len(errors) == len(told)
    for error, part in zip(errors, told, strict=True):
        assert error.startswith("CORS_ORIGINS ")
        assert part in error
        assert "list each origin" in error or "scheme://host[:port]" in error


def test_good_origins_are_accepted(read: Read) -> None:
    origins = ("https://a.example", "http://localhost:3000", "http://[::1]:8080", "https://b-c.example:8443")
    settings = read(CORS_ORIGINS=" , ".join(origins) + ",").settings
    assert settings is not None
    assert settings.cors_origins == origins


@pytest.mark.parametrize("value", ["*", " * ", "127.0.0.1,*", "*, 10.0.0.1"])
def test_trust_in_every_address_is_refused(read: Read, value: str) -> None:
    (error,) = read(FORWARDED_ALLOW_IPS=value).errors
    assert error.startswith("FORWARDED_ALLOW_IPS must not contain '*': ")


@pytest.mark.parametrize(
    "network", ["0.0.0.0/0", "::/0", "10.0.0.0/8", "10.1.2.0/23", "fd00::/63", "9.9.9.9/1"]
)
def test_trust_in_a_wide_network_is_warned_about(read: Read, network: str) -> None:
    report = read(FORWARDED_ALLOW_IPS=f"127.0.0.1, {network}")
    assert report.settings is not None
    (warning,) = report.warnings
    assert warning.startswith(f"FORWARDED_ALLOW_IPS trusts {network}, ")


@pytest.mark.parametrize(
    "value", ["", "127.0.0.1", "10.1.2.0/24,fd00::/64", "::1", "proxy.example", "not/a/network"]
)
def test_trust_in_a_proxy_is_not_warned_about(read: Read, value: str) -> None:
    report = read(FORWARDED_ALLOW_IPS=value)
    assert (report.errors, report.warnings) == ((), ())


URLS = [
    "LITELLM_URL",
    "QDRANT_URL",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
    "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT",
]


@pytest.mark.parametrize("name", URLS)
@pytest.mark.parametrize(
    "value",
    [
        "host:4000",
        "host",
        "ftp://host",
        "http://",
        "http://host:99999",
        "http://a b",
        "http://[::1",
        "//host",
    ],
)
def test_what_is_no_url_is_refused(read: Read, name: str, value: str) -> None:
    assert read(**{name: value}).errors == (
        f"{name} is not a URL: write http://host:port or https://host:port.",
    )


@pytest.mark.parametrize("name", URLS)
def test_a_url_with_credentials_is_refused_and_does_not_show_them(read: Read, name: str) -> None:
    secret = secrets.token_hex(8)
    for value in (f"https://someone:{secret}@host", f"https://{secret}@host:4000/path"):
        (error,) = read(**{name: value}).errors
        assert error == f"{name} must not contain a user name or password: put the key in its own variable."


@pytest.mark.parametrize("name", URLS)
def test_urls_are_accepted_and_empty_is_unset(read: Read, name: str) -> None:
    for value in ("http://host:4000", "https://host.example/v1", "http://[::1]:4317", ""):
        assert read(**{name: value}).errors == ()


@pytest.mark.parametrize("signal", ["traces", "metrics", "logs"])
@pytest.mark.parametrize("base", ["http://host:4318", "https://host/otlp"])
def test_the_base_endpoint_is_not_that_of_one_signal(read: Read, base: str, signal: str) -> None:
    for end in ("", "/", "//"):
        (error,) = read(OTEL_EXPORTER_OTLP_ENDPOINT=f"{base}/v1/{signal}{end}").errors
        assert error == (
            f"OTEL_EXPORTER_OTLP_ENDPOINT must not end in /v1/{signal}: each signal's path is appended to "
            f"it. Remove it, or set OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT."
        )
    own = f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT"
    assert read(**{own: f"{base}/v1/{signal}", "OTEL_EXPORTER_OTLP_ENDPOINT": base}).errors == ()


@pytest.mark.parametrize("name", ["LOGIN_FAILURES_PER_NAME", "LOGIN_FAILURES_PER_ADDRESS", "RATE_LIMIT"])
@pytest.mark.parametrize("value", ["10", "often", "10/fortnight", "-1/minute", "/minute", "x/minute"])
def test_a_bad_rate_is_refused(read: Read, name: str, value: str) -> None:
    assert read(**{name: value}).errors == (
        f"{name} is not a rate: write a number and a period, like 10/minute.",
    )
    assert read(**{name: "3 per hour"}).errors == ()


@pytest.mark.parametrize(("connect", "whole"), [("5", "5"), ("30", "10.5")])
def test_connecting_must_take_less_than_the_whole_call(read: Read, connect: str, whole: str) -> None:
    (error,) = read(LLM_CONNECT_TIMEOUT_S=connect, LLM_TIMEOUT_S=whole).errors
    assert error.startswith(f"LLM_CONNECT_TIMEOUT_S ({connect}) must be less than LLM_TIMEOUT_S ({whole})")


@pytest.mark.parametrize("odd", [" ", "\n", "\r\nX-More: 1", "ü", "\x7f", "\t"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(read: Read, odd: str) -> None:
    key = secrets.token_hex(8)
    (error,) = read(LITELLM_API_KEY=f"{key}{odd}{key}").errors
    assert error.startswith("LITELLM_API_KEY ")
    assert "ASCII" in error
    assert "header" in error
    assert key not in error


def test_several_workers_need_a_qdrant_server(read: Read) -> None:
    (error,) = read(WORKERS="2").errors
    assert error.startswith("WORKERS=2 needs a Qdrant server: set QDRANT_URL, or WORKERS=1.")
    assert read(WORKERS="2", QDRANT_URL="http://qdrant:6333").errors == ()


@pytest.mark.parametrize(
    ("more", "workers"),
    [
        ({}, 1),
        ({"QDRANT_URL": "http://qdrant:6333"}, 1),
        ({"VALKEY_URL": "valkey://valkey"}, 1),
        ({"QDRANT_URL": "http://qdrant:6333", "VALKEY_URL": "valkey://valkey"}, 3),
        (
            {
                "QDRANT_URL": "http://qdrant:6333",
                "VALKEY_URL": "valkey://valkey",
                "DATABASE_URL": "sqlite://",
            },
            1,
        ),
    ],
    ids=["nothing shared", "Qdrant", "Valkey", "both", "a database in memory"],
)
@pytest.mark.parametrize("auto", ["auto", "AUTO"])
def test_workers_are_as_many_as_processors_where_stores_are_shared(
    read: Read, monkeypatch: pytest.MonkeyPatch, more: dict[str, str], workers: int, auto: str
) -> None:
    monkeypatch.setattr("service.config.settings.processors", lambda: 3)
    report = read(WORKERS=auto, **more)
    assert report.settings is not None, report.errors
    assert report.settings.workers == workers


def test_a_wrong_number_of_workers_is_refused(read: Read) -> None:
    for wrong in ("automatic", "0", "65", "1.5"):
        (error,) = read(WORKERS=wrong).errors
        assert "WORKERS" in error


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu.max": "what?"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "0\n"}, 8),
    ],
    ids=str,
)
def test_processors_are_those_that_the_container_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], found: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(8)), raising=False)
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    assert processors(tmp_path) == found


@pytest.mark.parametrize("name", ["QDRANT_SHARD_NUMBER", "QDRANT_REPLICATION_FACTOR"])
def test_shards_and_copies_need_a_qdrant_server(read: Read, name: str) -> None:
    (error,) = read(**{name: "2"}).errors
    assert error == f"{name} needs a Qdrant server: set QDRANT_URL. The embedded store has no shards."
    assert read(**{name: "2", "QDRANT_URL": "http://qdrant:6333"}).errors == ()
    assert read(**{name: "0"}).errors == ()


def test_several_workers_are_told_which_limits_each_of_them_counts(read: Read) -> None:
    (warning,) = read(WORKERS="3", QDRANT_URL="http://qdrant:6333").warnings
    assert warning.startswith("WORKERS=3 ")
    assert "3 times" in warning
    for name in (
        *("RATE_LIMIT", "MAX_IN_FLIGHT", "LOGIN_FAILURES_PER_NAME", "LOGIN_FAILURES_PER_ADDRESS"),
        *("BREAKER_FAILURE_THRESHOLD", "RETRY_BUDGET_FLOOR", "CACHE_MEMORY_BYTES"),
    ):
        assert name in warning
    assert "VALKEY_URL lets them count RATE_LIMIT, " in warning
    assert read(WORKERS="1").warnings == ()


def test_what_workers_count_together_is_not_warned_about(read: Read) -> None:
    several = {"WORKERS": "3", "QDRANT_URL": "http://qdrant:6333"}
    (warning,) = read(**several, VALKEY_URL="valkey://valkey").warnings
    for name in ("RATE_LIMIT", "LOGIN_FAILURES_PER_NAME", "LOGIN_FAILURES_PER_ADDRESS", "VALKEY_URL"):
        assert name not in warning
    assert "MAX_IN_FLIGHT, MAX_IN_FLIGHT_PER_USER, RETRY_BUDGET_RATIO" in warning


@pytest.mark.parametrize(
    ("url", "valid"),
    [
        ("valkey://valkey", True),
        ("valkey://127.0.0.1:6379/3", True),
        ("valkeys://user:pass%40word@valkey.example.org:6380", True),
        ("redis://:password@10.0.0.1:6379/0", True),
        ("rediss://[::1]:6379/", True),
        ("http://valkey:6379", False),
        ("unix:///run/valkey.sock", False),
        ("valkey://", False),
        ("valkey:6379", False),
        ("valkey://valkey:port", False),
        ("valkey://valkey:0", False),
        ("valkey://valkey:70000", False),
        ("valkey://:hunter2secret@@valkey", False),
        ("valkey://valkey/hunter2secret", False),
        ("valkey://valkey?socket_timeout=60", False),
        ("valkey://valkey#x", False),
        ("valkey://val key", False),
        ("valkey://one:6379,other:6379", False),
        ("valkey+cluster://one,other:7000,[::1]:7001", True),
        ("redis+cluster://one/0", True),
        ("rediss+cluster://user:pass%2Cword,@one:7000,other:7000/", True),
        ("valkey+cluster://one:7000,", False),
        ("valkey+cluster://one:7000,hunter2secret:port", False),
        ("valkey+cluster://one:7000/1", False),
        ("valkey+cluster://" + ",".join(["one"] * 17), False),
        ("valkey+sentinel://one,other:26380/counts", True),
        ("valkeys+sentinel://:password@one:26379/counts/3", True),
        ("redis+sentinel://one:26379/my.master_1-a", True),
        ("valkey+sentinel://one:26379", False),
        ("valkey+sentinel://one:26379/", False),
        ("valkey+sentinel://one:26379/hunter2secret!", False),
        ("valkey+sentinel://one:26379/counts/hunter2secret", False),
        ("valkey+replicas://one", False),
        ("sentinel://one/counts", False),
    ],
)
def test_a_valkey_url_names_a_server(read: Read, url: str, *, valid: bool) -> None:
    errors = read(VALKEY_URL=url).errors
    assert [error.partition(":")[0] for error in errors] == ([] if valid else ["VALKEY_URL is not valid"])
    assert "hunter2secret" not in str(errors)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("valkey://one,other", "it names several servers, but says neither +cluster nor +sentinel"),
        ("valkey+cluster://one/1", "a cluster has no other database than 0"),
        (
            "valkey+sentinel://one",
            "behind the sentinels' addresses it has no valid name of the service they watch",
        ),
        ("valkey+cluster://one,", "an address is not a host with a port"),
    ],
)
def test_what_is_wrong_with_a_valkey_url_is_named(read: Read, url: str, reason: str) -> None:
    (error,) = read(VALKEY_URL=url).errors
    assert error.startswith(f"VALKEY_URL is not valid: {reason}. Write valkey://")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "11", "soon"])
def test_the_wait_for_valkey_is_a_time(read: Read, value: str) -> None:
    (error,) = read(VALKEY_TIMEOUT_S=value).errors
    assert error.startswith("VALKEY_TIMEOUT_S is not valid: ")


def test_a_valkey_url_is_not_shown(read: Read) -> None:
    found = read(VALKEY_URL="valkey://:hunter2secret@valkey").settings
    assert found is not None
    assert "hunter2secret" not in repr(found)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"STREAM_TIMEOUT_S": "20"},
            (
                "STREAM_TIMEOUT_S (20) must be at least LLM_TIMEOUT_S (30): "
                "the first chunk may take that long."
            ),
        ),
        (
            {"STREAM_CHUNK_TIMEOUT_S": "601"},
            "STREAM_CHUNK_TIMEOUT_S (601) must be at most STREAM_TIMEOUT_S (600): it is a part of it.",
        ),
        (
            {"STREAM_KEEP_ALIVE_S": "60"},
            (
                "STREAM_KEEP_ALIVE_S (60) must be less than STREAM_CHUNK_TIMEOUT_S (60): "
                "comments are sent within that time."
            ),
        ),
    ],
)
def test_limits_of_a_stream_must_agree(read: Read, variables: dict[str, str], sentence: str) -> None:
    assert read(**variables).errors == (sentence,)


@pytest.mark.parametrize(
    "variables",
    [
        {"LLM_TIMEOUT_S": "900"},
        {"STREAM_CHUNK_TIMEOUT_S": "10"},
        {"STREAM_TIMEOUT_S": "40"},
        {"STREAM_KEEP_ALIVE_S": "1"},
    ],
)
def test_a_default_limit_of_a_stream_gives_way(read: Read, variables: dict[str, str]) -> None:
    assert read(**variables).errors == ()


def test_a_spool_of_another_user_is_refused(
    read: Read, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    owner = tmp_path.stat().st_uid
    given = {"SPOOL_PATH": str(tmp_path), "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    assert read(**given).errors == ()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    (error,) = read(**given).errors
    assert error.startswith(f"SPOOL_PATH belongs to another user ({owner}), ")
    # Without MLflow nothing is written there.
    assert read(**{**given, "MLFLOW_TRACKING_URI": None}).errors == ()


@pytest.mark.parametrize(
    ("url", "valid"),
    [
        ("sqlite:///data/other.db", True),
        ("sqlite:////var/lib/other.db", True),
        ("sqlite://", True),
        ("postgresql://someone:a%40b@db.internal:5432/llmops", True),
        ("postgres://db/llmops?sslmode=verify-full", True),
        ("postgresql+psycopg://db/llmops", True),
        ("postgresql+psycopg2://db/llmops", False),
        ("postgresql://db", False),
        ("postgresql://some one@db/llmops", False),
        ("sqlite:///data/other.db?mode=ro", False),
        ("sqlite:data/other.db", False),
        ("mysql://someone:hunter2secret@db/llmops", False),
        ("data/other.db", False),
    ],
)
def test_a_database_url_names_a_file_or_a_server(read: Read, url: str, *, valid: bool) -> None:
    errors = read(DATABASE_URL=url).errors
    said = (
        "DATABASE_URL is not valid: write sqlite:///path for a file, or "
        "postgresql://user:password@host/database for a server."
    )
    assert errors == (() if valid else (said,))


def test_a_database_in_memory_is_not_shared(read: Read) -> None:
    assert read(WORKERS="2", QDRANT_URL="http://qdrant:6333", DATABASE_URL="sqlite://").errors == (
        (
            "DATABASE_URL must name a file or a server when WORKERS is 2: a database in memory belongs to "
            "one process."
        ),
    )


def test_a_database_file_of_others_is_refused(
    read: Read, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, url = tmp_path / "own.db", f"sqlite:///{tmp_path}/own.db"
    path.touch(0o600)
    assert read(DATABASE_URL=url).errors == ()
    path.chmod(0o640)
    assert read(DATABASE_URL=url).errors == (
        "DATABASE_URL names a file that others can use (mode 0640): run chmod 600 on it.",
    )
    path.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    (error,) = read(DATABASE_URL=url).errors
    assert error.startswith("DATABASE_URL names a file of another user (")


ISSUER = "https://login.example.org/realms/main"


@pytest.mark.parametrize(
    "issuer",
    [
        ISSUER,
        "https://login.example.org/",
        "https://login.example.org:8443",
        "http://127.0.0.1:5556/dex",
        "http://localhost:8080",
        "http://[::1]:8080",
    ],
)
def test_an_issuer_over_https_or_on_this_machine_is_valid(read: Read, issuer: str) -> None:
    assert read(OIDC_ISSUERS=issuer, OIDC_AUDIENCE="llm-api").errors == ()


@pytest.mark.parametrize(
    ("issuer", "said"),
    [
        ("http://login.example.org", "is not https: 'http://login.example.org'"),
        ("http://10.0.0.7:8080", "is not https"),
        ("http://127.0.0.1.example.org", "is not https"),
        ("http://localhost.example.org", "is not https"),
        ("login.example.org", "is not the URL of an issuer"),
        ("ftp://login.example.org", "is not the URL of an issuer"),
        ("https://", "is not the URL of an issuer"),
        ("https://login.example.org:0", "is not the URL of an issuer"),
        ("https://login.example.org?x=1", "is not the URL of an issuer"),
        ("https://login.example.org#a", "is not the URL of an issuer"),
        ("https://login.example.org/a b", "is not the URL of an issuer"),
        ("https://user:hunter22@login.example.org", "is not the URL of an issuer"),
        (f"https://login.example.org/{'x' * 200}", "is longer than 200 characters"),
    ],
)
def test_an_issuer_that_could_be_replaced_on_the_way_is_refused(read: Read, issuer: str, said: str) -> None:
    (error,) = read(OIDC_ISSUERS=f"{ISSUER},{issuer}", OIDC_AUDIENCE="llm-api").errors
    assert error.startswith("OIDC_ISSUERS has an entry that ")
    assert said in error
    assert "hunter22" not in error


def test_all_problems_with_issuers_are_told_at_once(read: Read) -> None:
    errors = read(
        OIDC_ISSUERS=",".join([ISSUER, ISSUER, *(f"https://a{number}.example" for number in range(20))]),
        JWT_ISSUER=ISSUER,
        OIDC_ADMIN_CLAIM="groups",
    ).errors
    starts = (
        "OIDC_ISSUERS names an issuer twice",
        "OIDC_ISSUERS has 22 entries",
        "JWT_ISSUER must not be one of OIDC_ISSUERS",
        "OIDC_AUDIENCE must be set with OIDC_ISSUERS",
        "OIDC_ADMIN_VALUES must be set too",
    )
    assert len(errors) == len(starts)
    assert all(error.startswith(start) for error, start in zip(errors, starts, strict=True))
    (error,) = read(
        OIDC_ADMIN_CLAIM=None, OIDC_ADMIN_VALUES="owners", OIDC_ISSUERS=None, JWT_ISSUER=None
    ).errors
    assert error.startswith("OIDC_ADMIN_CLAIM must be set too")


def test_a_list_of_issuers_is_taken_as_written(read: Read) -> None:
    settings = read(
        OIDC_ISSUERS=f"{ISSUER}, https://b.example/ ,",
        OIDC_AUDIENCE="a,b",
        OIDC_ADMIN_CLAIM="g",
        OIDC_ADMIN_VALUES="x",
    ).settings
    assert settings is not None
    assert settings.oidc_issuers == (ISSUER, "https://b.example/")
    assert settings.oidc_audience == ("a", "b")


def test_a_misspelt_name_of_the_issuers_is_warned_about(read: Read) -> None:
    (warning,) = [one for one in read(OIDC_ISSUER=ISSUER).warnings if "OIDC" in one]
    assert warning == "OIDC_ISSUER is not a setting. Did you mean OIDC_ISSUERS?"
