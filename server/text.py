"""Text to token ids: prompts and conversations, under a model's own tokenizer.

Uses `tokenizers` directly; transformers would load torch into the server. Knows nothing of HTTP or of the engine's work.
Raises InvalidRequest for what a client's text is to blame for, and SourceError for files that cannot be used.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from engine.errors import InvalidRequest, SourceError
from server.detokenize import Detokenizer, NumberWriter
from server.template import ChatTemplate, Message


class TextTokenizer:
    """The tokenizer and chat template of one model.

    Special tokens in a completion's prompt are parsed: whoever writes a prompt by hand writes the template, too. In a chat they count
    only where the template put them; the same characters in a message stay text. Safe to use from several threads.
    """

    def __init__(self, tokenizer_json: str | None, template: ChatTemplate | None = None):
        """`tokenizer_json` is None for a model without a tokenizer: it takes token ids and answers with their numbers as text."""
        self._tokenizer = _plain(tokenizer_json) if tokenizer_json is not None else None
        self._template = template
        if self._tokenizer is None or tokenizer_json is None:
            return
        self._literal_tokenizer = _plain(tokenizer_json)  # the flag is state of an instance, so there are two
        self._literal_tokenizer.encode_special_tokens = True
        added: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        special = {token_id: token for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(special)
        self._literals = {token.content: token_id for token_id, token in special.items()}
        self._in_message = _alternatives(re.escape(literal) for literal in self._literals)
        self._in_template = _alternatives(_as_tokenizer_sees(token) for token in special.values())
        self._prefix = tuple(self._tokenizer.encode("", add_special_tokens=True).ids[:1])  # BOS, where the tokenizer adds one
        self._is_byte_level, self._has_byte_fallback = _byte_decoders(json.loads(tokenizer_json).get("decoder"))

    @classmethod
    def from_folder(cls, folder: Path | str) -> TextTokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja, as far as they are there."""
        path = Path(folder)
        tokenizer_json = path / "tokenizer.json"
        try:
            text = tokenizer_json.read_text("utf-8") if tokenizer_json.exists() else None
            return cls(text, ChatTemplate.from_folder(path))
        except SourceError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for a file that it cannot read
            raise SourceError(f"The tokenizer in {path} cannot be read: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None and self._tokenizer is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a completion's prompt, with BOS where the tokenizer adds it and the text does not begin with it already."""
        ids: list[int] = self._required("prompt").encode(text, add_special_tokens=True).ids
        if self._prefix and tuple(ids[:2]) == self._prefix * 2:
            return ids[1:]
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation under the chat template, up to where the assistant is to speak."""
        if self._template is None or self._tokenizer is None:
            raise InvalidRequest("This model has no chat template; use /v1/completions.", "messages")
        if not any(self._in_message.search(message["content"]) for message in messages):
            ids: list[int] = self._tokenizer.encode(self._template.render(messages), add_special_tokens=False).ids
            return ids
        escape = _Escape(self._in_message)
        rendered = self._template.render([{**m, "content": escape.hide(m["content"])} for m in messages])
        return self._encode_around_special(rendered, escape)

    def detokenizer(self) -> Detokenizer | NumberWriter:
        """A fresh one for one answer."""
        return NumberWriter() if self._tokenizer is None else Detokenizer(self)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids that stand next to each other, special tokens left out."""
        text: str = self._required("prompt").decode(list(ids), skip_special_tokens=True)
        return text

    def raw_bytes(self, token_id: int) -> bytes | None:
        """What a token that stands for bytes stands for; None for a token whose text depends on its neighbours."""
        if not (self._is_byte_level or self._has_byte_fallback):
            return None
        token: str | None = self._required("prompt").id_to_token(token_id)
        if token is None:  # the padding of an embedding matrix has no text
            return b""
        if self._is_byte_level:
            return _byte_level(token)
        return bytes.fromhex(token[3:5]) if _BYTE_TOKEN.fullmatch(token) else None

    def _encode_around_special(self, rendered: str, escape: _Escape) -> list[int]:
        ids: list[int] = []
        end = 0
        for match in self._in_template.finditer(rendered):
            ids += self._encode_literally(escape.reveal(rendered[end : match.start()]))
            ids.append(self._literals[next(filter(None, match.groups()))])
            end = match.end()
        return ids + self._encode_literally(escape.reveal(rendered[end:]))

    def _encode_literally(self, text: str) -> list[int]:
        ids: list[int] = self._literal_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _required(self, param: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequest("This model has no tokenizer; send token ids.", param)
        return self._tokenizer


class _Escape:
    """Hides the literals of special tokens in messages from the tokenizer while a template is rendered.

    Each literal becomes a number between private-use characters; the random part keeps a message from forging one.
    """

    def __init__(self, literals: re.Pattern[str]):
        self._literals = literals
        self._mark = f"\ue000{secrets.token_hex(8)}:"
        self._hidden: list[str] = []

    def hide(self, text: str) -> str:
        return self._literals.sub(self._hide_one, text)

    def reveal(self, text: str) -> str:
        return re.sub(rf"{self._mark}(\d+)\ue001", lambda match: self._hidden[int(match[1])], text)

    def _hide_one(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._mark}{len(self._hidden) - 1}\ue001"


# ---------------------------------------------------------------------- tokenizer files
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _plain(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()  # some files carry the settings of their training
    tokenizer.no_padding()
    return tokenizer


def _byte_decoders(decoder: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether all tokens stand for bytes, and whether some do."""
    if decoder is None:
        return False, False
    kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
    return "ByteLevel" in kinds, "ByteFallback" in kinds


def _byte_level(token: str) -> bytes:
    table = _byte_level_table()
    try:
        return bytes(table[char] for char in token)
    except KeyError:  # an added token that is written as it is
        return token.encode("utf-8", "replace")


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: a byte that prints stands for itself, the others follow from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _alternatives(patterns: Any) -> re.Pattern[str]:
    """Any of these, the longest first, as the tokenizer decides between them."""
    ordered = sorted(patterns, key=len, reverse=True)
    return re.compile("|".join(ordered)) if ordered else re.compile(r"(?!)")


def _as_tokenizer_sees(token: AddedToken) -> str:
    """A special token, its literal in a group, with the white space that it takes with it."""
    before, behind = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return f"{before}({re.escape(token.content)}){behind}"
