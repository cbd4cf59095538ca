"""What provenance says of each token: its role in the round, and how many drafts a round had."""

from __future__ import annotations

from typing import Any

from engine.request import Round
from server.text import TextTokenizer
from tests.fakes import Part
from tests.server.conftest import Served, chunks_of

ROUNDS = [
    Part((10,)),
    Part((11, 12, 13), Round(4, 2), drafted_mask=0b011),  # two stand, the third was rejected
    Part((14, 15, 16), Round(2, 2), drafted_mask=0b011),  # both stand
    Part((17, 18), Round(1, 1), drafted_mask=0b11),  # the token behind the draft is the drafter's, too
    Part((19, 20), Round(2, 2), drafted_mask=0b11),  # max_tokens cut the bonus off
]


def seen(choice: dict[str, Any]) -> list[tuple[int, str, str, int | None]]:
    return [(token["token_id"], token["by"], token["role"], token["drafted"]) for token in choice["provenance"]]


EXPECTED = [
    (10, "target", "plain", 0),
    (11, "drafter", "accepted", None),
    (12, "drafter", "accepted", None),
    (13, "target", "recovered", 4),
    (14, "drafter", "accepted", None),
    (15, "drafter", "accepted", None),
    (16, "target", "bonus", 2),
    (17, "drafter", "accepted", None),
    (18, "drafter", "bonus", 1),
    (19, "drafter", "accepted", None),
    (20, "drafter", "accepted", None),
]


async def test_each_token_has_its_role(both: Served) -> None:
    both.answer_with(parts=ROUNDS)
    choice = (await both.chat(speculation={"provenance": True})).json()["choices"][0]
    assert seen(choice) == EXPECTED
    chunks = chunks_of(await both.chat(stream=True, speculation={"provenance": True}))
    assert [token for chunk in chunks for choice in chunk["choices"] if "provenance" in choice for token in seen(choice)] == EXPECTED


async def test_the_drafts_of_whole_rounds_are_those_of_the_metrics(served: Served) -> None:
    served.answer_with(parts=ROUNDS[:4])
    body = (await served.chat(speculation={"provenance": True})).json()
    tokens, counted = body["choices"][0]["provenance"], body["metrics"]["speculative_decoding"]
    assert sum(token["drafted"] or 0 for token in tokens) == counted["num_draft_tokens"] == 7
    assert sum(token["role"] == "accepted" for token in tokens) == counted["num_accepted_draft_tokens"] == 5


async def test_a_round_that_a_stop_string_cuts_ends_with_a_draft(served: Served, tokenizer: TextTokenizer) -> None:
    ids = tuple(tokenizer.encode("xyz!"))
    served.answer_with(parts=[Part(ids, Round(3, 3), drafted_mask=0b0111)])
    choice = (await served.complete(stop="z", speculation={"provenance": True})).json()["choices"][0]
    assert [(role, drafted) for _, _, role, drafted in seen(choice)] == [("accepted", None)] * 3
