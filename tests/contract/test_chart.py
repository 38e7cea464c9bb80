"""The Helm chart agrees with the settings, with the image and with the project; needs no Helm."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from deploy.backends import ROOT
from deploy.chart_schema import SCHEMA, secret_names, with_settings
from service.config.env_validator import REQUIRED, problems
from service.config.settings import PASSED_THROUGH, Settings
from service.recording.spool import Spool
from tests.contract.test_env_example import SHOWN
from tests.harness import make_settings

CHART = ROOT / "deploy/helm"
TEXT = SCHEMA.read_text("utf-8")
DEFINITIONS: dict[str, Any] = json.loads(TEXT)["definitions"]
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
OURS = {name.upper() for name in Settings.model_fields} | set(PASSED_THROUGH)


def test_the_schema_has_the_settings_of_the_service() -> None:
    """After a change of a setting: `make chart-schema`."""
    assert with_settings(TEXT) == TEXT


def test_every_setting_is_plain_or_secret_and_there_is_no_other() -> None:
    plain, secret = (set(DEFINITIONS[name]["properties"]) for name in ("settings", "secretSettings"))
    assert plain | secret == OURS
    assert plain.isdisjoint(secret_names())
    assert secret_names() <= secret
    assert set(REQUIRED) <= secret_names()


@pytest.mark.parametrize("name", ["PASSWORD", "SECRET", "TOKEN", "API_KEY", "HEADERS", "DATABASE_URL"])
def test_no_setting_whose_name_tells_of_a_secret_is_plain(name: str) -> None:
    assert [one for one in DEFINITIONS["settings"]["properties"] if one.endswith(name)] == []


@pytest.mark.parametrize("name", sorted(DEFINITIONS["settings"]["properties"]))
def test_the_default_of_a_setting_is_one_that_the_schema_admits(name: str) -> None:
    schema = DEFINITIONS["settings"]["properties"][name]
    shown = SHOWN[name]["value"]
    if name in {"PORT", "SPOOL_PATH"} or not shown:
        return
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    value = yaml.safe_load(shown) if {"integer", "number", "boolean"} & set(types) else shown
    assert jsonschema_rs.is_valid(schema, value), (schema, value)


def test_every_object_of_the_schema_refuses_names_that_it_does_not_know() -> None:
    def open_objects(schema: Any, path: str) -> list[str]:
        if isinstance(schema, list):
            return [found for one in schema for found in open_objects(one, path)]
        if not isinstance(schema, dict):
            return []
        found = [f for key, value in schema.items() for f in open_objects(value, f"{path}/{key}")]
        if schema.get("type") == "object" and schema.get("additionalProperties", True) is True:
            found.append(path)
        return found

    # Helm's own, and Kubernetes's, which are long.
    assert set(open_objects(json.loads(TEXT), "")) == {
        "/properties/global",
        *(
            f"/properties/affinity/properties/{one}"
            for one in ("nodeAffinity", "podAffinity", "podAntiAffinity")
        ),
    }


def test_the_values_are_those_of_the_schema() -> None:
    found = jsonschema_rs.validator_for(json.loads(TEXT)).iter_errors(VALUES)
    assert [one.message for one in found] == []


def test_the_schema_and_the_values_have_the_same_names() -> None:
    def compare(schema: dict[str, Any], values: dict[str, Any], path: str) -> None:
        assert set(schema["properties"]) - {"global"} == set(values), path
        for name, value in values.items():
            inner = schema["properties"][name]
            if isinstance(value, dict) and "properties" in inner and value:
                compare(inner, value, f"{path}.{name}")

    compare({"properties": json.loads(TEXT)["properties"]}, VALUES, "")


def test_names_and_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert (chart["name"], chart["appVersion"]) == (project["name"], project["version"])
    assert VALUES["image"]["repository"] == project["name"]


def test_the_user_and_the_folder_are_those_of_the_image() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    helpers = (CHART / "templates/_helpers.tpl").read_text("utf-8")
    assert "USER 10001:10001\n" in dockerfile
    for field in ("runAsUser", "runAsGroup", "fsGroup"):
        assert f"\n{field}: 10001\n" in helpers
    assert "/app/data\n" in dockerfile
    assert VALUES["settings"]["SPOOL_PATH"] == f"/app/{Settings.model_fields['spool_path'].default}"
    assert VALUES["settings"]["QDRANT_PATH"] == f"/app/{Settings.model_fields['qdrant_path'].default}"


def test_why_the_spool_is_a_folder_below_the_volume(tmp_path: Path) -> None:
    """Kubernetes gives a volume to a group. The service refuses a spool that a group may write to."""
    volume, spool = tmp_path / "data", tmp_path / "data/spool"
    volume.mkdir()
    volume.chmod(0o2770)

    def refused(path: Path) -> bool:
        settings = make_settings(spool_path=str(path), mlflow_tracking_uri="http://mlflow:5000")
        return any(name == "SPOOL_PATH" for name, _ in problems(settings))

    assert refused(volume)
    Spool(spool, 65_536, lambda _count, _reason: None).close()
    assert not refused(spool)
    # What `fsGroupChangePolicy: Always` would do when the volume is mounted again.
    spool.chmod(0o2770)
    assert refused(spool)
    assert "\nfsGroupChangePolicy: OnRootMismatch\n" in (CHART / "templates/_helpers.tpl").read_text("utf-8")


def test_a_volume_holds_more_than_a_full_spool() -> None:
    size = VALUES["persistence"]["size"]
    assert int(size.removesuffix("Gi")) * 2**30 > 2 * Settings.model_fields["spool_max_bytes"].default


def test_a_pod_may_not_be_refused_for_its_own_limits() -> None:
    """The memory that the settings permit is less than the limit of the container."""
    fields = Settings.model_fields
    bodies = 8 * fields["max_v1_body_bytes"].default
    answers = fields["cache_memory_bytes"].default + fields["cache_queue_bytes"].default
    measured = 240 * 2**20
    assert VALUES["resources"]["limits"]["memory"] == "1Gi"
    assert bodies + answers + measured < 2**30


def test_the_versions_that_were_tried_are_those_that_are_built() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    readme = " ".join((ROOT / "deploy/README.md").read_text("utf-8").split())
    built = dict(re.findall(r"^(KUBERNETES|GATEWAY_API|KEDA)_VERSION := (\d+\.\d+)", makefile, re.MULTILINE))
    assert f"schema of Kubernetes {built['KUBERNETES']}, of the Gateway API {built['GATEWAY_API']} " in readme
    assert f"or of KEDA {built['KEDA']}" in readme
    assert f"| KEDA {built['KEDA']}, with" in readme
    helm, server = (
        (ROOT / "otel/build" / name / "go.mod").read_text("utf-8") for name in ("helm", "kubernetes")
    )
    (version,) = re.findall(r"^\s+helm\.sh/helm/v4 v(\S+)", helm, re.MULTILINE)
    assert f"builds Helm {version} from its module" in readme
    (version,) = re.findall(r"^\s+k8s\.io/kubernetes v(\S+)", server, re.MULTILINE)
    assert f"KUBERNETES_VERSION := {version}\n" in makefile
