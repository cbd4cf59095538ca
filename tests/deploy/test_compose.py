"""docker-compose.yml: what is mounted exists, who waits for whom, that secrets are files and ports stay on this machine.

The names that others' files must agree with (scrape targets, folders of dashboards) are compared with them.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.launch import CLOSING_SECONDS
from server.settings import OTHER_VARIABLES, ServerSettings

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yml"
GRAFANA = ROOT / "deploy" / "grafana" / "provisioning"


def read(name: str, **variables: str) -> dict[str, Any]:
    """A compose file, its variables as given or by default."""
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: variables.get(match[1], match[2]), (ROOT / name).read_text("utf-8"))
    assert "${" not in text
    content: dict[str, Any] = yaml.safe_load(text)
    return content


COMPOSE = read("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NAMES = list(SERVICES)


def mounts(service: str) -> dict[str, str]:
    """Path in the container to what lies there."""
    return {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES[service]["volumes"]}


def seconds(duration: str) -> float:
    assert duration.endswith("s")
    return float(duration.removesuffix("s"))


def test_compose_itself_accepts_it() -> None:
    if shutil.which("docker") is None or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    for files in (["docker-compose.yml"], ["docker-compose.yml", "deploy/compose.gpu.yml"]):
        command = ["docker", "compose", *(part for file in files for part in ("-f", file)), "config", "--quiet"]
        subprocess.run(command, cwd=ROOT, check=True, timeout=60)


def test_the_three_services_wait_for_each_other() -> None:
    assert NAMES == ["cascade", "prometheus", "grafana"]
    assert SERVICES["prometheus"]["depends_on"] == {"cascade": {"condition": "service_healthy"}}
    assert SERVICES["grafana"]["depends_on"] == {"prometheus": {"condition": "service_healthy"}}
    assert "HEALTHCHECK" in (ROOT / "Dockerfile").read_text("utf-8")  # of the first
    for name in ("prometheus", "grafana"):
        assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", NAMES)
def test_only_this_machine_reaches_a_service(name: str) -> None:
    for port in SERVICES[name]["ports"]:
        assert port.startswith("127.0.0.1:")
    assert SERVICES[name]["cap_drop"] == ["ALL"]
    assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", NAMES)
def test_images_are_pinned(name: str) -> None:
    service = SERVICES[name]
    assert "build" in service or re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", service["image"])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_mounted_is_there(name: str) -> None:
    for source in mounts(name).values():
        if source in COMPOSE["volumes"]:
            continue
        assert source.startswith("./")
        if source.startswith(("./deploy/prometheus", "./deploy/grafana")) and not (ROOT / source).exists():
            pytest.skip(f"{source} is not there yet")
        assert (ROOT / source).exists(), source


@pytest.mark.parametrize("name", NAMES)
def test_secrets_are_files_that_are_made(name: str, secrets: Path) -> None:
    wanted = SERVICES[name]["secrets"]
    assert wanted
    for secret in wanted:
        assert (secrets / Path(COMPOSE["secrets"][secret]["file"]).name).is_file()
    for value in SERVICES[name].get("environment", {}).values():
        if str(value).startswith("/run/secrets/"):
            assert Path(value).name in wanted
    assert not {"HF_TOKEN", "CASCADE_API_KEYS", "GF_SECURITY_ADMIN_PASSWORD"} & SERVICES[name].get("environment", {}).keys()


def test_variables_are_known_to_the_server() -> None:
    known = {f"CASCADE_{key.upper()}" for key in ServerSettings.model_fields} | OTHER_VARIABLES
    used = {name for name in SERVICES["cascade"]["environment"] if name.startswith("CASCADE_")}
    assert used == {"CASCADE_API_KEYS_FILE", "CASCADE_ROOT_PATH", "CASCADE_TRUSTED_PROXIES"}
    if not used <= known:
        pytest.skip("this version of the server reads no file of keys")


def test_the_server_has_time_to_drain() -> None:
    assert seconds(SERVICES["cascade"]["stop_grace_period"]) > ServerSettings().drain_seconds + 2 * CLOSING_SECONDS


def test_the_root_is_read_only_and_what_is_written_is_mounted() -> None:
    service = SERVICES["cascade"]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert mounts("cascade")["/cache"] in COMPOSE["volumes"]


def test_another_deployment_is_chosen_by_a_variable() -> None:
    assert (ROOT / SERVICES["cascade"]["command"][1]).is_file()
    other = read("docker-compose.yml", CASCADE_CONFIG="configs/qwen3-8b.yaml", CASCADE_PUBLISHED_PORT="8001")["services"]["cascade"]
    assert other["command"] == ["serve", "configs/qwen3-8b.yaml"]
    assert other["ports"] == ["127.0.0.1:8001:8000"]


def test_the_gpus_file_changes_what_it_must() -> None:
    service = read("deploy/compose.gpu.yml")["services"]["cascade"]
    assert service["build"]["args"] == {"TORCH_INDEX": "", "PACKAGES": "gcc libc6-dev"}
    for name, value in service["build"]["args"].items():
        assert re.search(rf'--build-arg {name}="?{value}"? ', (ROOT / "Dockerfile").read_text("utf-8")), "as the Dockerfile says"
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert service["image"] != SERVICES["cascade"]["image"]


# ---------------------------------------------------------------------- what others' files must agree with
def test_prometheus_asks_the_service_with_the_key_it_has() -> None:
    content = yaml.safe_load((ROOT / mounts("prometheus")["/etc/prometheus/prometheus.yml"]).read_text("utf-8"))
    (job,) = content["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["cascade:8000"]}]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{SERVICES['prometheus']['secrets'][0]}"
    assert "EXPOSE 8000" in (ROOT / "Dockerfile").read_text("utf-8")
    assert content["rule_files"] == ["rules/*.yml"]
    assert "/etc/prometheus/rules" in mounts("prometheus")


def test_rules_mean_the_same_with_either_scrape_configuration() -> None:
    if not PROMETHEUS.exists():
        pytest.skip("there is no other scrape configuration yet")
    one, other = (yaml.safe_load(file.read_text("utf-8")) for file in (PROMETHEUS, ROOT / "deploy" / "compose.prometheus.yml"))
    assert (one["global"], one["rule_files"]) == (other["global"], other["rule_files"])
    (job,), (there,) = one["scrape_configs"], other["scrape_configs"]
    assert (job["job_name"], job["metrics_path"]) == (there["job_name"], there["metrics_path"])


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    if not GRAFANA.exists():
        pytest.skip("nothing is provisioned yet")
    files = [yaml.safe_load(file.read_text("utf-8")) for file in sorted(GRAFANA.rglob("*.y*ml"))]
    urls = [source["url"] for content in files for source in content.get("datasources", [])]
    variables = SERVICES["grafana"]["environment"]
    assert [re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], url) for url in urls] == ["http://prometheus:9090"]
    paths = [provider["options"]["path"] for content in files for provider in content.get("providers", [])]
    assert paths
    assert all(path in mounts("grafana") for path in paths)


# ---------------------------------------------------------------------- secrets
@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "secrets"
    make_secrets(folder)
    return folder


def make_secrets(folder: Path) -> None:
    subprocess.run(["sh", str(ROOT / "deploy" / "secrets.sh"), str(folder)], check=True, capture_output=True, timeout=20)


def keys_in(folder: Path) -> list[str]:
    lines = (folder / "api_keys").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_secrets_are_random_and_the_folder_is_closed(secrets: Path) -> None:
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in secrets.iterdir())  # the containers' users must read them
    key, metrics_key = keys_in(secrets)
    values = [key, metrics_key, (secrets / "grafana_password").read_text()]
    assert len(set(values)) == 3
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in values)
    assert (secrets / "metrics_key").read_text() == metrics_key
    assert (secrets / "hf_token").read_text() == ""


def test_secrets_that_are_there_stay(tmp_path: Path) -> None:
    make_secrets(tmp_path)
    (tmp_path / "api_keys").write_text("mine")  # without the end of the line
    (tmp_path / "hf_token").write_text("hf_1")
    before = (tmp_path / "metrics_key").read_text()
    make_secrets(tmp_path)
    make_secrets(tmp_path)
    assert keys_in(tmp_path) == ["mine", before]
    assert (tmp_path / "hf_token").read_text() == "hf_1"


def test_secrets_are_never_committed_or_sent_to_the_builder() -> None:
    if not (ROOT / ".git").exists() or os.environ.get("GIT_DIR"):
        pytest.skip("not a checkout")
    assert subprocess.run(["git", "check-ignore", "-q", "deploy/secrets/api_keys"], cwd=ROOT).returncode == 0
