"""The page's files over HTTP: headers, caching, and that nothing on them comes from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.page import FOLDER, files
from tests.server.conftest import Served, error_of, make_deployment, serve

NAMES = sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("path", ["/", *(f"/web/{name}" for name in NAMES)])
async def test_every_file_is_sent_with_a_strict_policy(served: Served, path: str) -> None:
    response = await served.http.get(path)
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;")
    assert all(f"{name} 'none'" in policy for name in ("base-uri", "form-action", "frame-ancestors"))
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-cache"
    kinds = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
    assert response.headers["content-type"].split(";")[0] == kinds[Path(path).suffix or ".html"]


async def test_who_has_a_file_is_not_sent_it_again(both: Served) -> None:
    first = await both.http.get("/web/main.js")
    tag = first.headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        again = await both.http.get("/web/main.js", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert "content-security-policy" in again.headers
    assert (await both.http.get("/web/main.js", headers={"If-None-Match": '"other"'})).content == first.content
    head = await both.http.head("/web/main.js")
    assert (head.status_code, head.headers["etag"], int(head.headers["content-length"])) == (200, tag, len(first.content))


@pytest.mark.parametrize("path", ["/web/none.js", "/web/", "/web", "/web/..%2Fpage.py", "/web/%2e%2e/page.py", "/index.html"])
async def test_nothing_else_is_there(served: Served, path: str) -> None:
    error_of(await served.http.get(path), 404)


async def test_the_page_is_open_where_the_api_wants_a_key(folder: Path) -> None:
    async with serve(folder, make_deployment(api_keys=["secret"])) as served:
        assert (await served.http.get("/")).status_code == 200
        assert (await served.http.get("/web/main.js")).status_code == 200
        assert "secret" not in (await served.http.get("/")).text
        error_of(await served.http.get("/v1/cascade"), 401)


async def test_a_deployment_may_have_no_page(folder: Path) -> None:
    async with serve(folder, make_deployment(page=False)) as served:
        error_of(await served.http.get("/"), 404)
        error_of(await served.http.get("/web/main.js"), 404)
        assert (await served.chat()).status_code == 200


async def test_the_page_is_no_part_of_the_apis_description(served: Served) -> None:
    paths = (await served.http.get("/openapi.json")).json()["paths"]
    assert "/" not in paths
    assert "/v1/cascade" in paths


def test_the_page_names_only_files_that_are_there_and_every_module() -> None:
    html = files()["index.html"].content.decode()
    named = re.findall(r'(?:src|href)="web/([^"]+)"', html)
    assert set(named) <= set(NAMES)
    assert {name for name in NAMES if name.endswith(".js")} <= set(named), "what is not preloaded takes another round trip"
    for name in NAMES:
        for imported in re.findall(r'from "\./([^"]+)"', files()[name].content.decode() if name.endswith(".js") else ""):
            assert imported in NAMES


def test_no_file_reads_text_as_html_or_names_another_origin() -> None:
    for name, file in files().items():
        text = file.content.decode()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), name
        assert not re.search(r'https?://(?!www\.w3\.org/2000/svg")', text), name
        assert not re.search(r"<script>|<style|\son\w+=\"|\sstyle=\"", text), name
    assert sum(len(file.content) for file in files().values()) < 100_000
