"""Commands of `cascade chat`: what they change in the next request, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from server.terminal.client import AlphaRange, ChatError, Controls, Rule, Variant
from server.terminal.session import COMMANDS, Quit, Session, start

CONTROLS = Controls(
    model="tiny",
    target="target",
    drafter="drafter",
    max_draft=4,
    models=[
        Variant("tiny", None, True, "exact", 0),
        Variant("tiny:fast", "fast", True, "opt", 0.3),
        Variant("tiny:plain", "plain", False, "exact", 0),
    ],
    rules=[
        Rule("exact", "Nothing.", True, None),
        Rule("token_v3", "Likely ones.", True, AlphaRange(-1, 0.5, 0.2)),
        Rule("opt", "Most.", False, AlphaRange(None, None, 0.1)),
    ],
)


def after(*commands: str, model: str | None = None) -> Session:
    session = start(CONTROLS, model)
    for command in commands:
        session.command(command)
    return session


@pytest.mark.parametrize(
    ("commands", "model", "speculation"),
    [
        ((), "tiny", {}),
        (("/preset fast",), "tiny:fast", {}),
        (("/preset tiny:plain",), "tiny:plain", {}),
        (("/rule token_v3",), "tiny", {"rule": "token_v3"}),
        (("/rule token_v3 0.35",), "tiny", {"rule": "token_v3", "alpha": 0.35}),
        (("/rule token_v3", "/alpha -0.5"), "tiny", {"rule": "token_v3", "alpha": -0.5}),
        (("/rule token_v3 0.5", "/rule exact"), "tiny", {"rule": "exact"}),
        (("/preset fast", "/alpha 7"), "tiny:fast", {"alpha": 7.0}),
        (("/preset fast", "/rule opt 1"), "tiny:fast", {"rule": "opt", "alpha": 1.0}),
        (("/draft 3",), "tiny", {"max_draft": 3}),
        (("/draft off",), "tiny", {"enabled": False}),
        (("/draft 3", "/preset plain"), "tiny:plain", {}),
    ],
)
def test_commands_set_what_is_drafted(commands: tuple[str, ...], model: str, speculation: dict[str, Any]) -> None:
    body = after(*commands).body("hello")
    assert (body["model"], body["speculation"]) == (model, speculation | {"provenance": True})


def test_commands_set_sampling_and_the_system_message() -> None:
    body = after("/temperature 0.7", "/seed 5", "/max 9", "/system Be brief.").body("hello")
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.7, 5, 9)
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    body = after("/seed 5", "/seed random", "/max 9", "/max all", "/system x", "/system").body("hello")
    assert body.keys() == {"model", "messages", "stream", "stream_options", "speculation", "temperature"}
    assert len(body["messages"]) == 1


def test_turns_go_along_until_a_new_conversation() -> None:
    session = after()
    session.answered("a", "b")
    session.answered("never", "")
    assert [turn["content"] for turn in session.body("c")["messages"]] == ["a", "b", "c"]
    session.command("/new")
    assert [turn["content"] for turn in session.body("c")["messages"]] == ["c"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("/nothing", "/nothing is no command"),
        ("/preset slow", "the presets are tiny, fast, plain"),
        ("/preset", "the presets are"),
        ("/rule best", "the rules are exact, token_v3"),
        ("/rule opt", "not allowed here but in presets"),
        ("/rule token_v3 0.6", "alpha of token_v3 is -1 to 0.5"),
        ("/rule token_v3 nan", "must be a number"),
        ("/alpha 0.1", "The rule exact has no alpha"),
        ("/alpha", "must be a number"),
        ("/draft 5", "from 0 to 4"),
        ("/draft some", "from 0 to 4"),
        ("/temperature 3", "at most 2"),
        ("/seed -1", "whole number"),
        ("/seed " + "9" * 5000, "whole number"),
        ("/max 0", "whole number"),
    ],
)
def test_what_cannot_be_done_names_what_can_and_changes_nothing(command: str, said: str) -> None:
    session = after()
    before = session.body("x")
    with pytest.raises(ChatError, match=said):
        session.command(command)
    assert session.body("x") == before


def test_a_model_that_is_not_served_is_refused_at_the_start() -> None:
    assert after(model="fast").body("x")["model"] == "tiny:fast"
    with pytest.raises(ChatError, match="the presets are"):
        after(model="gpt")


def test_the_summary_says_what_counts() -> None:
    assert after("/rule token_v3").summary() == "tiny: rule token_v3 at 0.2, temperature 0"
    assert after("/preset fast", "/draft 2").summary() == "tiny:fast: rule opt at 0.3, up to 2 drafts, temperature 0"
    assert after("/preset plain", "/seed 3").summary() == "tiny:plain: no drafts, temperature 0, seed 3"


def test_help_and_rules_explain_themselves() -> None:
    session = after()
    assert all(f"/{name}" in session.command("/help") for name in COMMANDS)
    assert "-1 to 0.5" in session.command("/rules")
    assert session.command("/settings") == session.summary()
    with pytest.raises(Quit):
        session.command("/quit")
