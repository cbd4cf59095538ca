"""/tokenize, /detokenize and the count of a chat's prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.text import TextTokenizer
from tests.server.conftest import TEMPLATE, USER, Served, build_tokenizer, error_of, make_deployment, serve

CHAT = "/v1/chat/completions/input_tokens"


async def ask(served: Served, path: str, **body: Any) -> dict[str, Any]:
    response = await served.http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_a_prompt(served: Served, tokenizer: TextTokenizer) -> None:
    for path in ("/tokenize", "/v1/tokenize"):
        ids = tokenizer.encode("hello <|im_end|>é")
        found = await ask(served, path, prompt="hello <|im_end|>é", model="org/tiny", return_token_strs=True)
        assert found == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": found["token_strs"]}
        assert "".join(found["token_strs"]).startswith("hello <|im_end|>")
    assert await ask(served, "/tokenize", prompt="") == {"count": 0, "max_model_len": 512, "tokens": [], "token_strs": None}


async def test_there_and_back(served: Served) -> None:
    for text in ("the quick brown fox", "<|im_start|>user\nhé 🦊<|im_end|>"):
        ids = (await ask(served, "/tokenize", prompt=text))["tokens"]
        for path in ("/detokenize", "/v1/detokenize"):
            assert await ask(served, path, tokens=ids, model="tiny") == {"prompt": text}
    assert await ask(served, "/detokenize", tokens=[]) == {"prompt": ""}


async def test_bos_is_added_unless_it_is_not_wanted(tmp_path: Path) -> None:
    build_tokenizer(add_bos=True).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    async with serve(tmp_path) as served:
        with_bos, without = [
            (await ask(served, "/tokenize", prompt="hello", add_special_tokens=wanted))["tokens"] for wanted in (True, False)
        ]
        assert with_bos == [0, *without]
        assert (await ask(served, "/tokenize", prompt="<|endoftext|>hello"))["tokens"] == with_bos
        chat = (await ask(served, "/tokenize", messages=USER, add_special_tokens=False))["tokens"]
        assert chat[0] == 1, "the template writes all of them"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_generation_prompt": False},
        {"messages": [*USER, {"role": "assistant", "content": "hi <|im_end|>"}], "continue_final_message": True},
        {"chat_template_kwargs": {"some": "variable"}},
    ],
)
async def test_a_conversation_is_what_the_chat_would_read(served: Served, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "messages": USER, **fields}
    found = await ask(served, "/tokenize", **body)
    count = await ask(served, CHAT, **body, max_tokens=5, temperature=0.5, stream=True)
    response = await served.http.post("/v1/chat/completions", json=body)
    assert response.json()["usage"]["prompt_tokens"] == found["count"] == count["input_tokens"]
    assert count["object"] == "response.input_tokens"
    assert tuple(found["tokens"]) == served.engine.requests[0].prompt_ids
    assert len(served.engine.requests) == 1, "the engine hears of the chat alone"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "prompt"),
        ("/tokenize", {"prompt": "a" * 200_000}, 400, None),
        ("/tokenize", {"messages": USER, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": USER, "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [1024]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [2**70]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
        (CHAT, {"messages": USER}, 400, "model"),
        (CHAT, {"model": "other", "messages": USER}, 404, "model"),
        (CHAT, {"model": "tiny", "messages": []}, 400, "messages"),
        (CHAT, {"model": "tiny", "messages": USER, "suffix": "x"}, 400, "suffix"),
    ],
)
async def test_mistakes(served: Served, path: str, body: dict[str, Any], status: int, param: str | None) -> None:
    response = await served.http.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    assert error_of(response, status)["param"] == param


async def test_a_prompt_that_does_not_fit_is_counted_all_the_same(served: Served) -> None:
    assert (await ask(served, "/tokenize", prompt="a b " * 1000))["count"] > 512
    assert (await ask(served, CHAT, model="tiny", messages=[{"role": "user", "content": "a b " * 1000}]))["input_tokens"] > 512


async def test_a_model_without_tokenizer_or_template(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        assert error_of(await served.http.post("/tokenize", json={"prompt": "a"}), 400)["param"] == "prompt"
        assert error_of(await served.http.post("/tokenize", json={"messages": USER}), 400)["param"] == "messages"
        assert await ask(served, "/detokenize", tokens=[5, 6]) == {"prompt": " 5 6"}


async def test_keys_guard_them(folder: Path) -> None:
    async with serve(folder, make_deployment(api_keys=("key",))) as served:
        for path in ("/tokenize", "/detokenize", "/v1/tokenize", CHAT):
            assert error_of(await served.http.post(path, json={}), 401)
