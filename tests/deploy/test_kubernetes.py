"""deploy/kubernetes: what kustomize makes of it is valid, agrees with the server and with itself, and is as closed as it says."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.launch import CLOSING_SECONDS
from server.metrics import Metrics
from server.record import Objectives
from server.settings import OTHER_VARIABLES, ServerSettings, load
from tests.deploy.kustomize import Resource, build

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
BUILT = {name: build(FOLDER / name) for name in ("base", "gpu", "example")}
LABEL = {"app.kubernetes.io/name": "cascade-serve"}

everywhere = pytest.mark.parametrize("name", list(BUILT))


def one(name: str, kind: str) -> Resource:
    (found,) = (resource for resource in BUILT[name] if resource["kind"] == kind)
    return found


def pod(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = one(name, "Deployment")["spec"]["template"]["spec"]
    return spec


def container(name: str) -> dict[str, Any]:
    (found,) = pod(name)["containers"]
    return dict(found)


def variables(name: str) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container(name)["env"]}


# ---------------------------------------------------------------------- validity
@pytest.mark.skipif(importlib.util.find_spec("kubernetes_validate") is None, reason="kubernetes-validate is not installed")
@everywhere
@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_accepts_it(name: str, version: str) -> None:
    import kubernetes_validate

    checked = [resource for resource in BUILT[name] if resource["kind"] != "ServiceMonitor"]  # whose schema is the operator's
    assert len(checked) == len(BUILT[name]) - 1
    for resource in checked:
        kubernetes_validate.validate(resource, version, strict=True)


def kustomize(folder: Path) -> str:
    if shutil.which("kustomize"):
        command = ["kustomize", "build"]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    else:
        pytest.skip("kustomize is not installed")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@everywhere
def test_kustomize_makes_the_same(name: str) -> None:
    text = re.sub(r"cascade-config-[a-z0-9]{10}\b", "cascade-config", kustomize(FOLDER / name))
    assert as_set(list(yaml.safe_load_all(text))) == as_set(BUILT[name])


def as_set(value: Any) -> Any:
    """Without the order of lists, which kustomize changes."""
    if isinstance(value, dict):
        return {key: as_set(part) for key, part in value.items()}
    return sorted((as_set(part) for part in value), key=lambda part: json.dumps(part, sort_keys=True)) if isinstance(value, list) else value


def test_every_file_is_used() -> None:
    """A manifest that no kustomization names is never applied."""
    for folder in (path.parent for path in FOLDER.rglob("kustomization.yaml")):
        content = (folder / "kustomization.yaml").read_text("utf-8")
        for file in folder.glob("*.yaml"):
            assert file.name == "kustomization.yaml" or re.search(rf"\b{re.escape(file.name)}\b", content), file


# ---------------------------------------------------------------------- who means whom
@everywhere
def test_selectors_mean_the_pods_of_the_deployment_and_no_others(name: str) -> None:
    deployment = one(name, "Deployment")["spec"]
    assert deployment["template"]["metadata"]["labels"] == LABEL
    assert deployment["selector"] == {"matchLabels": LABEL}
    assert one(name, "Service")["spec"]["selector"] == LABEL
    assert one(name, "PodDisruptionBudget")["spec"]["selector"] == {"matchLabels": LABEL}
    assert one(name, "NetworkPolicy")["spec"]["podSelector"] == {"matchLabels": LABEL}
    assert one(name, "ServiceMonitor")["spec"]["selector"] == {"matchLabels": LABEL}
    assert one(name, "Service")["metadata"]["labels"] == LABEL
    target = one(name, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": one(name, "Deployment")["metadata"]["name"]}


@everywhere
def test_ports_and_volumes_have_the_names_they_are_used_by(name: str) -> None:
    (port,) = container(name)["ports"]
    assert port == {"name": "http", "containerPort": 8000}
    assert "EXPOSE 8000" in (ROOT / "Dockerfile").read_text("utf-8")
    assert [part["targetPort"] for part in one(name, "Service")["spec"]["ports"]] == ["http"]
    assert [part["port"] for part in one(name, "ServiceMonitor")["spec"]["endpoints"]] == ["http"]
    assert {mount["name"] for mount in container(name)["volumeMounts"]} == {volume["name"] for volume in pod(name)["volumes"]}
    assert all(probe["httpGet"]["port"] == "http" for key, probe in container(name).items() if key.endswith("Probe"))


# ---------------------------------------------------------------------- the server's life
@everywhere
def test_probes_ask_what_they_should(name: str) -> None:
    it = container(name)
    assert (it["livenessProbe"]["httpGet"]["path"], it["readinessProbe"]["httpGet"]["path"]) == ("/health", "/ready")
    assert it["startupProbe"]["httpGet"]["path"] == "/ready"
    assert it["startupProbe"]["periodSeconds"] * it["startupProbe"]["failureThreshold"] >= 600
    assert "scheme" not in it["readinessProbe"]["httpGet"]  # TLS ends at the ingress


@everywhere
def test_a_pod_has_time_to_drain(name: str) -> None:
    sleeping, seconds = container(name)["lifecycle"]["preStop"]["exec"]["command"]
    drain = float(variables(name)["CASCADE_DRAIN_SECONDS"])
    assert sleeping == "sleep"
    assert pod(name)["terminationGracePeriodSeconds"] >= float(seconds) + drain + 2 * CLOSING_SECONDS
    readiness = container(name)["readinessProbe"]
    assert float(seconds) >= readiness["periodSeconds"]


@everywhere
def test_variables_are_known_to_the_server(name: str) -> None:
    known = {f"CASCADE_{key.upper()}" for key in ServerSettings.model_fields} | OTHER_VARIABLES
    used = {variable for variable in variables(name) if variable.startswith("CASCADE_")}
    if "api_keys_file" not in ServerSettings.model_fields:
        used.remove("CASCADE_API_KEYS_FILE")
    assert used <= known


def test_links_to_services_set_no_variables() -> None:
    """A Service named cascade would make CASCADE_PORT=tcp://10.0.0.1:80, which is no port."""
    assert one("base", "Service")["metadata"]["name"] == "cascade"
    assert pod("base")["enableServiceLinks"] is False


@everywhere
def test_the_deployment_file_is_there(name: str) -> None:
    command, file = container(name)["args"]
    assert command == "serve"
    if name == "example":
        mounted = {mount["name"]: mount["mountPath"] for mount in container(name)["volumeMounts"]}
        assert file == f"{mounted['config']}/deployment.yaml"
        file = "deploy/kubernetes/example/deployment.yaml"
    assert f"{load(ROOT / file, {}).model.name}:exact" in load(ROOT / file, {}).model_ids


@everywhere
def test_threads_are_as_many_as_cpus(name: str) -> None:
    assert variables(name)["OMP_NUM_THREADS"] == container(name)["resources"]["requests"]["cpu"]


# ---------------------------------------------------------------------- rights
@everywhere
def test_a_pod_may_do_nothing_it_need_not(name: str) -> None:
    assert pod(name)["automountServiceAccountToken"] is False
    rights = pod(name)["securityContext"]
    assert (rights["runAsNonRoot"], rights["runAsUser"], rights["seccompProfile"]) == (True, 10001, {"type": "RuntimeDefault"})
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {mount["mountPath"] for mount in container(name)["volumeMounts"] if not mount.get("readOnly")}
    assert {"/cache", "/tmp"} <= written


@everywhere
def test_keys_come_from_a_secret_that_must_exist(name: str) -> None:
    (volume,) = (volume for volume in pod(name)["volumes"] if "secret" in volume)
    (mount,) = (mount for mount in container(name)["volumeMounts"] if mount["name"] == volume["name"])
    assert not volume["secret"].get("optional", False)
    (item,) = volume["secret"]["items"]
    assert variables(name)["CASCADE_API_KEYS_FILE"] == f"{mount['mountPath']}/{item['path']}"
    (endpoint,) = one(name, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": volume["secret"]["secretName"], "key": "metrics_key"}


def test_the_network_is_closed_but_for_who_is_named() -> None:
    (rule,) = one("base", "NetworkPolicy")["spec"]["ingress"]
    assert len(rule["from"]) == 3
    assert rule["from"][2] == {"podSelector": {"matchLabels": {"cascade-client": "true"}}}
    assert one("base", "NetworkPolicy")["spec"]["egress"] == []  # the image has its model
    names, hub = one("gpu", "NetworkPolicy")["spec"]["egress"]
    assert {port["port"] for port in names["ports"]} == {53}
    assert "10.0.0.0/8" in hub["to"][0]["ipBlock"]["except"]


# ---------------------------------------------------------------------- load
@everywhere
def test_pods_are_added_by_a_metric_that_exists(name: str) -> None:
    (metric,) = one(name, "HorizontalPodAutoscaler")["spec"]["metrics"]
    wanted = metric["pods"]["metric"]["name"]
    assert f"# TYPE {wanted} gauge" in Metrics("tiny", Objectives(1.0, 1.0)).exposition(is_ready=True).decode()
    (rule,) = yaml.safe_load((FOLDER / "adapter-rules.yaml").read_text("utf-8"))["rules"]["custom"]
    assert rule["name"]["as"] == wanted
    assert rule["seriesQuery"].startswith(f"{wanted}{{")


@everywhere
def test_the_number_of_pods_is_the_autoscalers(name: str) -> None:
    assert "replicas" not in one(name, "Deployment")["spec"]


# ---------------------------------------------------------------------- the overlays
def test_the_gpus_overlay_asks_for_a_gpu_and_shares_its_models() -> None:
    resources = container("gpu")["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "1"
    (cache,) = (volume for volume in pod("gpu")["volumes"] if volume["name"] == "cache")
    assert cache == {"name": "cache", "persistentVolumeClaim": {"claimName": one("gpu", "PersistentVolumeClaim")["metadata"]["name"]}}
    assert container("gpu")["image"] == "cascade-serve:gpu"
    assert container("base")["image"] == "cascade-serve:cpu"


def test_the_ingress_and_the_server_agree_on_the_path() -> None:
    spec = one("example", "Ingress")["spec"]
    (rule,) = spec["rules"]
    (path,) = rule["http"]["paths"]
    assert path["path"] == variables("example")["CASCADE_ROOT_PATH"]
    assert path["backend"]["service"]["name"] == one("example", "Service")["metadata"]["name"]
    assert spec["tls"][0]["hosts"] == [rule["host"]] == ["llm.example.com"]
    ServerSettings.model_validate(
        {"root_path": path["path"], "trusted_proxies": variables("example")["CASCADE_TRUSTED_PROXIES"].split(",")}
    )
    limit = one("example", "Ingress")["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert int(limit.removesuffix("m")) << 20 >= ServerSettings().max_body_bytes


def test_the_example_has_its_own_image_and_namespace() -> None:
    assert container("example")["image"] == "registry.example.org/cascade-serve:1"
    assert {resource["metadata"]["namespace"] for resource in BUILT["example"]} == {"llm"}
