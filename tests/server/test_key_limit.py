"""How many requests of one API key may be open at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from engine.errors import ConfigError
from server.settings import load
from tests.server.conftest import USER, Served, chunks_of, error_of, make_deployment, serve, serve_socket, until

MINE, THEIRS = {"authorization": "Bearer mine"}, {"authorization": "Bearer theirs"}
BODY = {"model": "tiny", "prompt": "hello"}


def limited(most: int | None = 2) -> Any:
    return make_deployment(api_keys=("mine", "theirs"), max_requests_per_key=most)


async def ask(served: Served, key: dict[str, str] = MINE, path: str = "completions", **fields: Any) -> Any:
    return await served.http.post(f"/v1/{path}", json=BODY | fields, headers=key)


@pytest.mark.parametrize("running", [serve, serve_socket])
async def test_a_request_too_many_of_a_key_is_a_429(folder: Path, running: Any) -> None:
    async with running(folder, limited()) as served:
        hold = asyncio.Event()
        served.answer_with(hold=hold)
        held = [asyncio.ensure_future(ask(served, stream=stream)) for stream in (False, True)]
        await until(lambda: len(served.engine.requests) == 2)
        for path in ("completions", "chat/completions", "nothing"):
            response = await ask(served, path=path)
            error = error_of(response, 429)
            assert (error["type"], error["code"], error["param"]) == ("requests", "rate_limit_exceeded", None)
            assert "2 (server.max_requests_per_key)" in error["message"]
            assert response.headers["retry-after"] == "1"
        assert len(served.engine.requests) == 2
        assert (await served.http.get("/v1/models", headers=MINE)).status_code == 200, "what takes no work has no bound"
        others = asyncio.ensure_future(ask(served, THEIRS))
        await until(lambda: len(served.engine.requests) == 3)
        hold.set()
        whole, streamed, _ = await asyncio.gather(*held, others)
        assert whole.status_code == 200
        assert chunks_of(streamed)
        assert [(await ask(served)).status_code for _ in range(3)] == [200] * 3
        metrics = (await served.http.get("/metrics", headers=MINE)).text
        assert 'cascade_refusals_total{code="rate_limit_exceeded",status="429"} 3.0' in metrics


async def test_the_sdk_raises_its_own_class_and_asks_again_where_it_may(folder: Path) -> None:
    async with serve(folder, limited(1)) as served:
        hold = asyncio.Event()
        served.answer_with(hold=hold)
        first = asyncio.ensure_future(ask(served))
        await until(lambda: served.engine.requests)
        client = served.openai.with_options(api_key="mine")
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="tiny", messages=USER)
        assert (caught.value.status_code, caught.value.code) == (429, "rate_limit_exceeded")
        again = asyncio.ensure_future(client.with_options(max_retries=2).chat.completions.create(model="tiny", messages=USER))
        await asyncio.sleep(0.2)
        assert len(served.engine.requests) == 1
        hold.set()
        assert (await first).status_code == 200
        assert (await again).choices


async def test_whoever_leaves_or_is_refused_frees_the_place(folder: Path) -> None:
    async with serve_socket(folder, limited(1)) as served:
        served.answer_with(endless=True, delay=0.01)
        async with served.http.stream("POST", "/v1/completions", json=BODY | {"stream": True}, headers=MINE) as response:
            await anext(response.aiter_lines())
            assert error_of(await ask(served), 429)
        await until(lambda: not served.engine.streams)
        for _ in range(3):
            assert error_of(await ask(served, temperature=-1), 400)
        served.answer_with()
        assert (await ask(served)).status_code == 200


async def test_without_the_setting_nothing_is_counted(folder: Path) -> None:
    async with serve(folder, limited(None)) as served:
        hold = asyncio.Event()
        served.answer_with(hold=hold)
        asked = [asyncio.ensure_future(ask(served)) for _ in range(9)]
        await until(lambda: len(served.engine.requests) == 9)
        hold.set()
        assert {response.status_code for response in await asyncio.gather(*asked)} == {200}


def test_a_bound_by_key_wants_keys(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text("model: {name: tiny, target: {source: x}}\nserver: {max_requests_per_key: 4}\n")
    with pytest.raises(ConfigError, match=r"server\.max_requests_per_key: 4 - counts by key, and there are none"):
        load(file, {})
    assert load(file, {"CASCADE_API_KEYS": "a,b"}).server.max_requests_per_key == 4
    assert load(file, {"CASCADE_API_KEYS_FILE": "keys"}).server.max_requests_per_key == 4
    with pytest.raises(ConfigError, match="must be at least 1"):
        load(file, {"CASCADE_API_KEYS": "a", "CASCADE_MAX_REQUESTS_PER_KEY": "0"})
