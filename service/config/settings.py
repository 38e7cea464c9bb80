"""Every setting of the service. No other module reads the environment.

A setting's name carries its unit. ``.env.example`` documents each setting, and a test keeps the names and
defaults in both files equal. ``env_validator`` checks that the values are safe and consistent.
"""

import ctypes
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from dotenv import dotenv_values
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENV_FILE = ".env"

OtlpProtocol = Literal["grpc", "http/protobuf"]
SignalExporter = Literal["otlp", "none"]

HEAP_LIMITS = {"MALLOC_ARENA_MAX": (-8, 2), "MALLOC_TRIM_THRESHOLD_": (-1, 128 * 1024)}
"""glibc's variables, with their parameters of ``mallopt`` and our values: the number of heaps, and how much
may be free at the end of one. glibc raises a threshold that is not set with each large block it frees."""

PASSED_THROUGH = (
    "OTEL_EXPORTER_OTLP_COMPRESSION",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TIMEOUT",
    "OTEL_METRIC_EXPORT_INTERVAL",
    "OTEL_PROPAGATORS",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_BLRP_MAX_QUEUE_SIZE",
    "OTEL_BLRP_SCHEDULE_DELAY",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_INSECURE_TLS",
)
"""Standard variables that the SDKs of OpenTelemetry and MLflow read themselves, also accepted in ``.env``."""


MAX_WORKERS = 64
AUTO = "auto"
"""Value of ``WORKERS``: as many as there are processors where all stores are shared, else one."""

CGROUPS = Path("/sys/fs/cgroup")


class Settings(BaseSettings):
    """The configuration of one process. The environment takes precedence over ``.env``."""

    model_config = SettingsConfigDict(
        env_file=ENV_FILE,
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    # Serving
    environment: str = Field("development", min_length=1, max_length=64)
    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8000, ge=0, le=65535)
    workers: int = Field(1, ge=1, le=MAX_WORKERS)
    forwarded_allow_ips: str = ""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    max_body_bytes: int = Field(1_048_576, ge=1, le=104_857_600)
    max_v1_body_bytes: int = Field(33_554_432, ge=1, le=104_857_600)
    max_upload_bytes: int = Field(104_857_600, ge=1, le=2_147_483_648)
    request_body_timeout_s: float = Field(10.0, gt=0, le=3_600)
    max_in_flight: int = Field(200, ge=1, le=10_000)
    max_in_flight_per_user: int = Field(0, ge=0, le=10_000)
    rate_limit: str = "6000/minute"
    server_timing: bool = True
    shutdown_timeout_s: float = Field(30.0, ge=0, le=3_600)
    shutdown_grace_s: float = Field(0.0, ge=0, le=3_600)

    # Health
    health_ttl_s: float = Field(30.0, gt=0, le=3_600)
    health_interval_s: float = Field(10.0, gt=0, le=3_600)
    health_timeout_s: float = Field(3.0, gt=0, le=300)
    health_required: Annotated[tuple[Literal["qdrant", "litellm", "mlflow", "oidc"], ...], NoDecode] = (
        "qdrant",
        "litellm",
        "mlflow",
    )

    # Sign-in
    jwt_secret_key: SecretStr = SecretStr("")
    jwt_issuer: str = Field("llmops-api", min_length=1)
    jwt_audience: str = Field("llmops-api", min_length=1)
    jwt_ttl_s: int = Field(3_600, ge=60, le=86_400)
    jwt_leeway_s: int = Field(10, ge=0, le=60)
    auth_admin_password: SecretStr = SecretStr("")
    auth_user_password: SecretStr = SecretStr("")
    login_failures_per_name: str = "10/minute"
    login_failures_per_address: str = "50/minute"

    # OpenID Connect
    oidc_issuers: Annotated[tuple[str, ...], NoDecode] = ()
    oidc_audience: Annotated[tuple[str, ...], NoDecode] = ()
    oidc_user_claim: str = Field("sub", min_length=1, max_length=200)
    oidc_team_claim: str = Field("", max_length=200)
    oidc_admin_claim: str = Field("", max_length=200)
    oidc_admin_values: Annotated[tuple[str, ...], NoDecode] = ()
    oidc_jwks_max_stale_s: float = Field(3_600.0, ge=1, le=604_800)

    # Database
    database_url: SecretStr = SecretStr("sqlite:///data/llmops.db")
    identity_stale_s: float = Field(900.0, ge=0, le=86_400)

    # Shared counts
    valkey_url: SecretStr = SecretStr("")
    valkey_timeout_s: float = Field(0.05, gt=0, le=10)

    # Upstream
    litellm_url: str = "http://127.0.0.1:4000"
    litellm_api_key: SecretStr = SecretStr("")
    default_model: str = Field("demo", min_length=1, max_length=200)
    llm_timeout_s: float = Field(30.0, gt=0, le=3_600)
    llm_connect_timeout_s: float = Field(5.0, gt=0, le=300)
    llm_max_answer_bytes: int = Field(33_554_432, ge=1_024, le=1_073_741_824)
    stream_chunk_timeout_s: float = Field(60.0, gt=0, le=3_600)
    stream_timeout_s: float = Field(600.0, gt=0, le=86_400)
    stream_keep_alive_s: float = Field(15.0, gt=0, le=3_600)
    stream_write_timeout_s: float = Field(30.0, gt=0, le=3_600)
    stream_usage: Literal["auto", "never"] = "auto"
    pass_litellm_fields: Annotated[tuple[str, ...], NoDecode] = ()
    models_ttl_s: float = Field(300.0, ge=1, le=86_400)

    # Resilience
    retry_max: int = Field(3, ge=0, le=10)
    retry_base_delay_s: float = Field(1.0, gt=0, le=60)
    retry_jitter: float = Field(0.25, ge=0, le=1)
    retry_budget_ratio: float = Field(0.2, ge=0, le=1)
    retry_budget_floor: int = Field(30, ge=0, le=10_000)
    retry_budget_window_s: float = Field(10.0, gt=0, le=3_600)
    breaker_failure_threshold: int = Field(5, ge=1, le=1_000)
    breaker_timeout_s: float = Field(30.0, gt=0, le=3_600)

    # Vector store
    qdrant_url: str = ""
    qdrant_path: str = Field("data/qdrant", min_length=1)
    qdrant_api_key: SecretStr = SecretStr("")
    qdrant_timeout_s: int = Field(3, ge=1, le=300)
    qdrant_shard_number: int = Field(0, ge=0, le=1_000)
    qdrant_replication_factor: int = Field(0, ge=0, le=100)

    # Cache
    cache_enabled: bool = True
    cache_ttl_s: int = Field(3_600, ge=1, le=31_536_000)
    cache_scope: Literal["user", "shared"] = "user"
    cache_sampled: Literal["never", "ask", "generate", "always"] = "generate"
    cache_timeout_s: float = Field(0.25, gt=0, le=10)
    cache_max_entries: int = Field(20_000, ge=1, le=1_000_000_000)
    cache_max_entry_bytes: int = Field(1_048_576, ge=1_024, le=33_554_432)
    cache_memory_bytes: int = Field(67_108_864, ge=0, le=17_179_869_184)
    cache_queue_bytes: int = Field(33_554_432, ge=1_024, le=17_179_869_184)
    cache_semantic: bool = False
    cache_similarity: float = Field(0.9, gt=0, le=1)
    cache_embedding_timeout_s: float = Field(0.5, gt=0, le=30)
    embedding_model: str = Field("", max_length=200)

    # Call records in MLflow
    mlflow_tracking_uri: str = ""
    mlflow_experiment_name: str = Field("llmops-api", min_length=1, max_length=256)
    mlflow_timeout_s: int = Field(5, ge=1, le=300)
    mlflow_ui_url: str = ""
    spool_path: str = Field("data/spool", min_length=1)
    spool_max_bytes: int = Field(268_435_456, ge=65_536, le=1_099_511_627_776)
    spool_max_age_s: float = Field(604_800.0, ge=1, le=31_536_000)
    spool_fsync_interval_s: float = Field(1.0, gt=0, le=3_600)

    # Telemetry
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    trust_traceparent: Literal["all", "none"] = "all"
    grafana_url: str = ""
    telemetry_flush_timeout_s: float = Field(2.0, gt=0, le=60)
    otel_sdk_disabled: bool = False
    otel_service_name: str = "llmops-api"
    otel_instrumentation_genai_capture_message_content: Literal["NO_CONTENT", "SPAN_ONLY"] = "NO_CONTENT"
    otel_traces_sampler: Literal[
        "always_on",
        "always_off",
        "traceidratio",
        "parentbased_always_on",
        "parentbased_always_off",
        "parentbased_traceidratio",
    ] = "parentbased_always_on"
    otel_traces_sampler_arg: float = Field(1.0, ge=0, le=1)
    otel_traces_exporter: SignalExporter = "otlp"
    otel_metrics_exporter: SignalExporter = "otlp"
    otel_logs_exporter: SignalExporter = "otlp"
    otel_exporter_otlp_endpoint: str = ""
    otel_exporter_otlp_traces_endpoint: str = ""
    otel_exporter_otlp_metrics_endpoint: str = ""
    otel_exporter_otlp_logs_endpoint: str = ""
    otel_exporter_otlp_protocol: OtlpProtocol = "http/protobuf"
    otel_exporter_otlp_traces_protocol: OtlpProtocol | None = None
    otel_exporter_otlp_metrics_protocol: OtlpProtocol | None = None
    otel_exporter_otlp_logs_protocol: OtlpProtocol | None = None

    @property
    def in_flight_per_user(self) -> int:
        """How many of the requests in flight one user can have: as set, or half of them."""
        return min(self.max_in_flight_per_user or max(1, self.max_in_flight // 2), self.max_in_flight)

    @property
    def captures_content(self) -> bool:
        """Whether prompts and answers are recorded in MLflow."""
        return self.otel_instrumentation_genai_capture_message_content == "SPAN_ONLY"

    @field_validator(
        *("cors_origins", "health_required", "pass_litellm_fields"),
        *("oidc_issuers", "oidc_audience", "oidc_admin_values"),
        mode="before",
    )
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @model_validator(mode="before")
    @classmethod
    def _count_workers(cls, values: object) -> object:
        if isinstance(values, dict) and str(values.get("workers", "")).lower() == AUTO:
            in_memory = values.get("database_url") == "sqlite://"
            shared = values.get("qdrant_url") and values.get("valkey_url") and not in_memory
            return {**values, "workers": min(MAX_WORKERS, processors()) if shared else 1}
        return values

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return {"WARN": "WARNING"}.get(value.upper(), value.upper()) if isinstance(value, str) else value


class ClientSettings(BaseSettings):
    """What the command ``explain`` needs to ask a running service; not a part of that service's settings."""

    model_config = SettingsConfigDict(
        env_file=ENV_FILE, env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True
    )

    llmops_url: str = ""
    llmops_token: SecretStr = SecretStr("")


def processors(cgroups: Path = CGROUPS) -> int:
    """How many processors this process may use: those of its affinity, within the limit of its container.

    Args:
        cgroups: Where the kernel shows the limits of control groups, of version 2 or 1.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota_s, period_s in (_cgroup_limit(cgroups), _cgroup_1_limit(cgroups)):
        if quota_s > 0 and period_s > 0:
            # A part of a processor is worth a worker, if it is not the only one.
            count = min(count, max(1, round(quota_s / period_s)))
    return count


def _cgroup_limit(cgroups: Path) -> tuple[int, int]:
    """Microseconds of processor time in a period, and the period; zeros where there is no limit."""
    with suppress(OSError, ValueError):
        quota, period = (cgroups / "cpu.max").read_text("ascii").split()
        return int(quota), int(period)
    return 0, 0


def _cgroup_1_limit(cgroups: Path) -> tuple[int, int]:
    with suppress(OSError, ValueError):
        quota, period = (
            int((cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text("ascii")) for name in ("quota", "period")
        )
        return quota, period
    return 0, 0


def env_file_values() -> Mapping[str, str]:
    """Return the variables of ``.env`` in the working directory, without those that are empty."""
    return {name: value for name, value in dotenv_values(ENV_FILE).items() if value}


def variable_names() -> set[str]:
    """Return the names of all variables that are set in the environment or in ``.env``."""
    return set(os.environ) | set(env_file_values())


def prepare_environment(settings: Settings | None = None) -> None:
    """Set the environment variables that libraries read, before the first of those libraries is imported.

    OpenAI: every ``OPENAI_*`` variable is removed, because the SDK would let them override our settings.

    OpenTelemetry: HTTP semantic conventions in their stable form, the SDK's own metrics, no unformatted lines
    from gRPC on stderr, and the ``OTEL_*`` variables of ``.env``. ``OTEL_SDK_DISABLED`` is removed because it
    would stop the SDK from creating ids, and the request id is the trace id; the providers honour the setting
    by recording nothing.

    MLflow: no retries and a short time limit (the defaults are 7 retries of 120 s each), logging through the
    root logger, and no usage statistics.

    The C library: two heaps instead of eight for each processor, and free memory goes back to the system.
    This saves a tenth of the process's memory. glibc reads its variables when a process starts, so they are
    set for the workers, and ``mallopt`` is called for this process.

    Args:
        settings: Source of MLflow's time limit; without settings the SDK's default remains.
    """
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        del os.environ[name]
    for name, value in env_file_values().items():
        if name.startswith(("OTEL_", "MLFLOW_TRACKING_")):
            os.environ.setdefault(name, value)
    os.environ.pop("OTEL_SDK_DISABLED", None)
    os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
    os.environ.setdefault("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED", "true")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ["MLFLOW_CONFIGURE_LOGGING"] = "false"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    for name, (parameter, limit) in HEAP_LIMITS.items():
        if name not in os.environ:
            os.environ[name] = str(limit)
            # glibc's; another C library has no such function, or none that knows these.
            with suppress(AttributeError, OSError):
                ctypes.CDLL(None).mallopt(parameter, limit)
    if settings is not None:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(settings.mlflow_timeout_s)
