"""`cache_salt` on its way to the engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Served, error_of


@pytest.mark.parametrize(("fields", "expected"), [({}, ""), ({"cache_salt": None}, ""), ({"cache_salt": "é" * 1024}, "é" * 1024)])
async def test_every_prompt_has_the_salt_of_its_request(served: Served, fields: dict[str, Any], expected: str) -> None:
    for answer in (await served.complete(["a", "b"], **fields), await served.chat("a", **fields)):
        assert answer.status_code == 200
        assert "x-cascade-ignored" not in answer.headers
    assert [request.cache_salt for request in served.engine.requests] == [expected] * 3


@pytest.mark.parametrize("value", ["", "a" * 1025, 1, True, []])
async def test_what_is_no_salt(served: Served, value: Any) -> None:
    assert error_of(await served.complete(cache_salt=value), 400)["param"] == "cache_salt"
