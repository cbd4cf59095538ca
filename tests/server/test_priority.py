"""`priority` on its way to the engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Served, error_of


@pytest.mark.parametrize(
    ("fields", "expected"), [({}, 0), ({"priority": None}, 0), ({"priority": -5}, -5), ({"priority": 2**31 - 1}, 2**31 - 1)]
)
async def test_every_prompt_has_the_priority_of_its_request(served: Served, fields: dict[str, Any], expected: int) -> None:
    assert (await served.complete(["a", "b"], **fields)).status_code == 200
    assert (await served.chat("a", **fields)).status_code == 200
    assert [request.priority for request in served.engine.requests] == [expected] * 3


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 1.5, "1", True, [], 10**400])
async def test_what_is_no_priority(served: Served, value: Any) -> None:
    assert error_of(await served.complete(priority=value), 400)["param"] == "priority"
