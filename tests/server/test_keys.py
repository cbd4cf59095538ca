"""Who may ask: keys in the deployment, in a file, and as digests; and which pages' browsers may."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.errors import ConfigError
from server.app import create_app
from server.cli import app as program
from server.keys import digests_of
from server.settings import ServerSettings, load
from tests.fakes import FakeEngine, make_info
from tests.server.conftest import Served, error_of, make_deployment, serve

DIGEST = "sha256:" + hashlib.sha256(b"hashed").hexdigest()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"# of the front end\nplain\n\n   {DIGEST.upper().replace('SHA256', 'sha256')}  \n#no key\n", "utf-8")
    return file


async def test_keys_of_the_file_are_accepted_beside_the_others(folder: Path, keys_file: Path) -> None:
    async with serve(folder, make_deployment(api_keys=("own",), api_keys_file=str(keys_file))) as served:
        for key in ("own", "plain", "hashed"):
            assert (await served.http.get("/v1/models", headers=bearer(key))).status_code == 200
        for key in ("#no key", "# of the front end", DIGEST, DIGEST.removeprefix("sha256:"), ""):
            assert error_of(await served.http.get("/v1/models", headers=bearer(key)), 401)


async def test_a_file_alone_closes_every_route(folder: Path, keys_file: Path) -> None:
    async with serve(folder, make_deployment(api_keys_file=str(keys_file))) as served:
        described = (await served.http.get("/openapi.json", headers=bearer("plain"))).json()["paths"]
        for path in {*described, "/openapi.json", "/nothing", "/v1", "/health/", "/health%2f", "/metrics/"} - {"/health", "/ready"}:
            for method in ("GET", "POST", "OPTIONS", "HEAD"):
                response = await served.http.request(method, path)
                assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), (method, path)
        for path in ("/health", "/ready"):
            assert (await served.http.get(path)).status_code == 200
        for path in ("/", "/web/main.js"):
            assert (await served.http.get(path)).status_code == 200, "the page is open: a key is given in it"
        assert (await served.http.get("/web/absent.js")).status_code == 404


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory."),
        (b"", "holds no key; one a line."),
        (b"# a\n\n  \n", "holds no key; one a line."),
        (b"\xff\n", "is not UTF-8 text."),
        (b"a\nsha256:secret\n", "what begins with sha256: must be a digest, 64 hexadecimal digits; `cascade hash-key` makes one."),
    ],
)
def test_a_file_that_cannot_be_used_ends_the_start(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        create_app(FakeEngine(make_info()), make_deployment(api_keys_file=str(file)))
    assert str(caught.value).startswith(f"server.api_keys_file: {file}")
    assert str(caught.value).endswith(said)
    assert "secret" not in str(caught.value)


def test_a_key_that_stands_there_twice_is_one() -> None:
    assert len(digests_of(ServerSettings(api_keys=("hashed", DIGEST, "hashed")))) == 1


def test_a_digest_must_be_one() -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        ServerSettings(api_keys=("sha256:ab",))


def test_hash_key_prints_what_a_file_takes() -> None:
    assert CliRunner().invoke(program, ["hash-key"], input="hashed\n").stdout == f"{DIGEST}\n"
    for wrong in ("\n", "sha256:zz\n", f"sha256:{'0' * 64}\n"):
        assert CliRunner().invoke(program, ["hash-key"], input=wrong).exit_code == 2


# ---------------------------------------------------------------------- CORS
ORIGIN = {"origin": "https://app.example"}
PREFLIGHT = {**ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-lang"}


async def test_no_page_is_let_in_by_default(served: Served) -> None:
    response = await served.http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert response.status_code == 405
    for answered in (response, await served.http.get("/v1/models", headers=ORIGIN)):
        assert not [name for name in answered.headers if name.startswith("access-control")]


async def test_a_page_of_a_known_origin_may_ask(folder: Path) -> None:
    async with serve(folder, make_deployment(cors_origins=("https://app.example",), api_keys=("key",))) as served:
        preflight = await served.http.options("/v1/chat/completions", headers=PREFLIGHT)
        assert preflight.status_code == 200, "a browser sends no key with it"
        assert preflight.headers["access-control-allow-origin"] == ORIGIN["origin"]
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        assert preflight.headers["x-request-id"]
        response = await served.http.get("/v1/models", headers=ORIGIN | bearer("key"))
        assert response.headers["access-control-allow-origin"] == ORIGIN["origin"]
        assert {"x-request-id", "x-cascade-ignored"} <= set(response.headers["access-control-expose-headers"].split(", "))
        other = await served.http.options("/v1/models", headers=PREFLIGHT | {"origin": "https://other.example"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers


async def test_pages_can_read_every_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = make_deployment(cors_origins=("*",), api_keys=("key",), max_body_bytes=100)
    async with serve(folder, deployment, raise_app_exceptions=False) as served:
        monkeypatch.setattr(served.engine, "submit", lambda request: 1 / 0)
        bodies: list[tuple[int, dict[str, Any], dict[str, str]]] = [
            (401, {"model": "tiny"}, {}),
            (400, {"model": "tiny"}, bearer("key")),
            (404, {"model": "none", "prompt": "a"}, bearer("key")),
            (413, {"model": "tiny", "prompt": "a" * 100}, bearer("key")),
            (500, {"model": "tiny", "prompt": "a"}, bearer("key")),
        ]
        for status, body, headers in bodies:
            response = await served.http.post("/v1/completions", json=body, headers=ORIGIN | headers)
            assert error_of(response, status)
            assert response.headers["access-control-allow-origin"] == "*"
            assert response.headers["x-request-id"]


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://Example.org", "https://a b", "", "https://"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="an origin is a scheme"):
        ServerSettings(cors_origins=(origin,))


# ---------------------------------------------------------------------- the log
async def test_lines_about_a_request_name_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from engine.logs import ConsoleFormatter
    from server.logs import AboutRequests

    caplog.handler.addFilter(AboutRequests())
    caplog.handler.setFormatter(ConsoleFormatter())
    async with serve(folder, make_deployment(api_keys=("key",))) as served:
        secret = "my secret prompt"
        ok = {"model": "tiny", "prompt": secret, "unknown_field": 1}
        with caplog.at_level(logging.INFO, "server"):
            for body, authorization in ((ok, "key"), ({**ok, "stream": True}, "key"), ({**ok, "model": secret}, "key"), (ok, secret)):
                served.http.headers["x-request-id"] = f"id-{len(caplog.text.splitlines())}"
                before = len(caplog.records)
                response = await served.http.post("/v1/completions", json=body, headers=bearer(authorization))
                lines = caplog.text.splitlines()[before:]
                assert lines, response.text
                assert all(f": [{response.headers['x-request-id']}] " in line for line in lines), lines
    assert " status=404 code=model_not_found " in caplog.text
    assert " status=401 code=invalid_api_key " in caplog.text
    assert "secret" not in caplog.text


# ---------------------------------------------------------------------- settings
def test_variables_of_the_environment(tmp_path: Path, keys_file: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {name: a, target: {source: b}}\n", "utf-8")
    found = load(file, {"CASCADE_CORS_ORIGINS": "https://a.example, http://localhost:3000", "CASCADE_API_KEYS_FILE": str(keys_file)}).server
    assert found.cors_origins == ("https://a.example", "http://localhost:3000")
    assert len(digests_of(found)) == 2
    with pytest.raises(ConfigError, match=r"CASCADE_CORS_ORIGINS: .* holds no origin"):
        load(file, {"CASCADE_CORS_ORIGINS": ","})
    with pytest.raises(ConfigError, match=r"cors_origins\.0: 'a\.b' - an origin is a scheme"):
        load(file, {"CASCADE_CORS_ORIGINS": "a.b"})
    file.write_text("model: {name: a, target: {source: b}}\nserver: {api_keys: ['sha256:mine']}\n", "utf-8")
    with pytest.raises(ConfigError, match=r"server\.api_keys\.0: \(hidden\) - what begins with sha256:"):
        load(file, {})
