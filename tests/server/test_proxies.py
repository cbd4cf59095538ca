"""Behind a proxy and with a certificate: paths, addresses that are believed, TLS, and mistakes in all of them."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import ConfigError
from server.app import create_app
from server.fit import OWN_PATHS
from server.launch import Server, _ready, _uvicorn_config, run
from server.listener import bind
from server.settings import Deployment, ServerSettings, load
from server.tls import check_certificate
from tests.fakes import FakeEngine, make_info
from tests.server.conftest import USER, error_of, make_deployment, serve, until

MODEL = "model: {name: tiny, target: {source: some/folder}}\n"


@asynccontextmanager
async def launched(folder: Path, **settings: Any) -> AsyncIterator[tuple[str, Deployment]]:
    """An app as `cascade serve` runs it, and its address."""
    deployment = make_deployment(port=0, **settings)
    listener = bind(deployment.server)
    server = Server(_uvicorn_config(create_app(FakeEngine(make_info(str(folder))), deployment), deployment.server))
    task = asyncio.ensure_future(server.serve([listener]))
    try:
        await until(lambda: server.started or task.done())
        yield _ready(deployment, listener).split()[2], deployment
    finally:
        server.should_exit = True
        await task


# ---------------------------------------------------------------------- the path
@pytest.mark.parametrize("prefix", ["", "/llm/one"])
async def test_requests_are_served_with_the_root_path_and_without(folder: Path, prefix: str) -> None:
    async with serve(folder, make_deployment(root_path="/llm/one")) as served:
        answer = await served.http.post(f"{prefix}/v1/chat/completions", json={"model": "tiny", "messages": USER, "max_tokens": 2})
        assert answer.status_code == 200
        assert (await served.http.get(f"{prefix}/ready")).json() == {"status": "ready"}
        assert error_of(await served.http.get(f"{prefix}/v1/absent"), 404)["type"] == "invalid_request_error"


async def test_other_paths_do_not_become_shorter(folder: Path) -> None:
    async with serve(folder, make_deployment(root_path="/llm")) as served:
        for path in ("/llmhealth", "/LLM/health", "/other/llm/health", "/llm/llm/health"):
            assert (await served.http.get(path)).status_code == 404, path
        answer = await served.http.get("/llm")
        assert (answer.status_code, answer.headers["location"]) == (307, "/llm/")
    async with serve(folder) as served:
        assert (await served.http.get("/llm/health")).status_code == 404


async def test_the_page_is_served_under_the_root_path_too(folder: Path) -> None:
    async with serve(folder, make_deployment(root_path="/llm", api_keys=["secret"])) as served:
        for path in ("/llm/", "/llm/web/main.js", "/llm/web/style.css"):
            assert (await served.http.get(path)).status_code == 200, path


async def test_the_root_path_leads_around_no_key(folder: Path) -> None:
    async with serve(folder, make_deployment(root_path="/llm", api_keys=["secret"])) as served:
        for path in ("/llm/v1/models", "/llm/openapi.json", "/llm//v1/models", "/v1/models"):
            assert (await served.http.get(path)).status_code in (401, 404), path
        assert (await served.http.get("/llm/v1/models")).status_code == 401
        assert (await served.http.get("/llm/v1/models", headers={"authorization": "Bearer secret"})).status_code == 200
        assert (await served.http.get("/llm/health")).status_code == 200


async def test_the_description_names_the_root_path(folder: Path) -> None:
    async with serve(folder, make_deployment(root_path="/llm")) as served:
        assert (await served.http.get("/openapi.json")).json()["servers"] == [{"url": "/llm"}]
    async with serve(folder) as served:
        assert "servers" not in (await served.http.get("/openapi.json")).json()


async def test_no_route_begins_like_an_allowed_root_path(folder: Path) -> None:
    async with serve(folder) as served:
        paths = (await served.http.get("/openapi.json")).json()["paths"]
    assert {path.split("/")[1] for path in paths} - {""} <= OWN_PATHS


# ---------------------------------------------------------------------- who is believed
@pytest.mark.parametrize(
    ("trusted", "seen"), [(["127.0.0.0/8"], "203.0.113.9"), (["*"], "203.0.113.9"), (["10.0.0.7"], "127.0.0.1"), ([], "127.0.0.1")]
)
async def test_only_trusted_proxies_say_where_a_client_is(
    folder: Path, caplog: pytest.LogCaptureFixture, trusted: list[str], seen: str
) -> None:
    with caplog.at_level(logging.DEBUG, "server.requests"):
        async with launched(folder, trusted_proxies=trusted, log_level="debug") as (url, _), httpx.AsyncClient() as http:
            await http.get(f"{url}/health", headers={"x-forwarded-for": "203.0.113.9", "x-forwarded-proto": "https"})
    (line,) = (vars(record)["fields"] for record in caplog.records if record.name == "server.requests")
    assert line["client"] == seen


# ---------------------------------------------------------------------- certificates
def make_certificate(folder: Path, name: str = "server", *more: str) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes certificates, is not installed")
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    options = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", *options, *names, *(more or ("-nodes",)), "-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


async def test_a_certificate_makes_it_https(folder: Path, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    async with launched(folder, tls_certificate=certificate, tls_key=key) as (url, deployment):
        check_certificate(deployment.server)
        assert url.startswith("https://127.0.0.1:")
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(certificate))) as http:
            assert (await http.get(f"{url}/ready")).status_code == 200
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await http.get(f"{url}/ready")


def test_a_certificate_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    _, other = make_certificate(tmp_path, "other")
    _, locked = make_certificate(tmp_path, "locked", "-passout", "pass:secret")
    empty = tmp_path / "empty.pem"
    empty.touch()
    for pair, said in (
        ((tmp_path / "absent.pem", key), "server.tls_certificate: .*absent.pem - cannot be read: No such file or directory"),
        ((certificate, tmp_path), "server.tls_key: .* - cannot be read: Is a directory"),
        ((certificate, other), "server.tls_certificate: .*server.pem, server.tls_key: .*other.key - KEY_VALUES_MISMATCH"),
        ((empty, key), "no certificate or no key in PEM format|NO_START_LINE"),
        ((certificate, locked), "server.tls_key: is encrypted"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_certificate(ServerSettings(tls_certificate=pair[0], tls_key=pair[1]))


def test_a_certificate_is_tried_before_anything_is_loaded(tmp_path: Path) -> None:
    deployment = make_deployment(port=0, tls_certificate=tmp_path / "a.pem", tls_key=tmp_path / "a.key")
    with pytest.raises(ConfigError, match=r"server\.tls_certificate"):
        run(deployment, bind(deployment.server), lambda _: None, "absent:factory")


# ---------------------------------------------------------------------- mistakes in the file
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("root_path: llm", "server.root_path: 'llm' - a path begins with a slash, ends without one and needs no escapes"),
        ("root_path: /llm/", "server.root_path: '/llm/' - a path begins with a slash"),
        ("root_path: /", "server.root_path: '/' - a path begins with a slash"),
        ("root_path: /v1", "server.root_path: '/v1' - this server's own paths begin like that"),
        ("root_path: /web", "server.root_path: '/web' - this server's own paths begin like that"),
        ("root_path: /health/llm", "server.root_path: '/health/llm' - this server's own paths begin like that"),
        ("trusted_proxies: [proxy.local]", "server.trusted_proxies.0: 'proxy.local' - must be an address such as 10.0.0.7"),
        ("trusted_proxies: [10.0.0.1/8]", "server.trusted_proxies.0: '10.0.0.1/8' - must be an address such as 10.0.0.7"),
        ("tls_key: a.key", "server.tls_certificate - is required: tls_certificate and tls_key go together"),
        ("tls_certificate: a.pem", "server.tls_key - is required: tls_certificate and tls_key go together"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(f"{MODEL}server: {{{text}}}")
    with pytest.raises(ConfigError) as caught:
        load(file, {})
    assert str(caught.value).startswith(f"{file}: {said}")


def test_variables_set_them(tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(MODEL)
    variables = {"ROOT_PATH": "/llm", "TRUSTED_PROXIES": "10.0.0.0/8, 127.0.0.1", "TLS_CERTIFICATE": "/a.pem", "TLS_KEY": "/a.key"}
    server = load(file, {f"CASCADE_{name}": value for name, value in variables.items()}).server
    assert (server.root_path, server.trusted_proxies) == ("/llm", ("10.0.0.0/8", "127.0.0.1"))
    assert (server.tls_certificate, server.tls_key) == (Path("/a.pem"), Path("/a.key"))
    with pytest.raises(ConfigError, match=r"CASCADE_TRUSTED_PROXIES: .* - holds no value"):
        load(file, {"CASCADE_TRUSTED_PROXIES": ","})
