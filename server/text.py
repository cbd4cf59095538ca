"""Text to token ids: prompts and conversations, under a model's own tokenizer.

Uses `tokenizers` directly; transformers would load torch into the server. Knows nothing of HTTP or of the engine's work.
Raises InvalidRequest for what a client's text is to blame for, and SourceError for files that cannot be used.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Tokenizer

from engine.errors import ClientError, ContextLengthExceeded, InvalidRequest, SourceError
from server.detokenize import Detokenizer, NumberWriter
from server.template import DEFAULT_TURN, ChatTemplate, Message, Turn
from server.tokenizer_file import byte_decoders, byte_level, length_bound, without_first_prefix

LONG_TEXT = 8192  # characters; a longer one is worth a thread, in which `encode` and `encode_chat` leave the interpreter to others


class TextTooLong(ContextLengthExceeded):
    """A text of so many characters that its tokens cannot fit; `num_prompt_tokens` is the least that it can have."""

    def __init__(self, num_characters: int, least: int, max_model_len: int):
        ClientError.__init__(
            self,
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has {num_characters} characters, which are at "
            f"least {least} tokens. They were not counted any further. Shorten the prompt.",
        )
        self.num_prompt_tokens = least
        self.max_tokens = 1
        self.max_model_len = max_model_len


class TextTokenizer:
    """The tokenizer and chat template of one model.

    Special tokens in a completion's prompt are parsed: whoever writes a prompt by hand writes the template, too. In a chat they count
    only where the template put them; the same characters in a message stay text. Safe to use from several threads.
    """

    def __init__(self, tokenizer_json: str | None, template: ChatTemplate | None = None):
        """`tokenizer_json` is None for a model without a tokenizer: it takes token ids and answers with their numbers as text."""
        self._tokenizer = _plain(tokenizer_json) if tokenizer_json is not None else None
        self._template = template
        self._added: dict[str, int] = {}
        self._special: dict[str, tuple[int, AddedToken]] = {}
        self._token_texts: dict[int, tuple[str, bytes]] = {}
        if self._tokenizer is None or tokenizer_json is None:
            return
        spec = json.loads(self._tokenizer.to_str())  # as this version writes it: files leave out what has a default
        self._literal_tokenizer = _reading_literally(tokenizer_json)  # the flag is state of an instance, so there are two
        self._inner_tokenizer = self._literal_tokenizer  # for what does not begin a text
        if (inner := without_first_prefix(spec)) is not None:
            self._inner_tokenizer = _reading_literally(json.dumps(inner))
        self._length_bound = length_bound(spec)
        added: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        self._added = {token.content: token_id for token_id, token in added.items()}
        self._special = {token.content: (token_id, token) for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(token_id for token_id, _ in self._special.values())
        self._any_special = _any_of(self._special)
        self._prefix = tuple(self._tokenizer.encode("", add_special_tokens=True).ids[:1])  # BOS, where the tokenizer adds one
        self._is_byte_level, self._has_byte_fallback = byte_decoders(spec.get("decoder"))

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
    def template_source(self) -> str | None:
        """The chat template; None where there is none, or nothing to read it with."""
        return self._template.source if self._template is not None and self._tokenizer is not None else None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None and self._tokenizer is not None

    def encode(self, text: str, max_model_len: int | None = None, adds_special: bool = True) -> list[int]:
        """Ids of a completion's prompt, with BOS where the tokenizer adds it, unless `adds_special` is False, and the text does not begin
        with it already.

        Raises TextTooLong, before any work, for a text that must have more than `max_model_len` tokens.
        """
        tokenizer = self._required("prompt")
        self._check_length(text, max_model_len)
        ids = _ids(tokenizer, text, add_special_tokens=adds_special)
        if adds_special and self._prefix and tuple(ids[:2]) == self._prefix * 2:
            return ids[1:]
        return ids

    def encode_text(self, text: str, max_model_len: int | None = None) -> list[int]:
        """Ids of a text that stands behind another one; special tokens are text. Raises TextTooLong as `encode` does."""
        self._required("prediction")
        self._check_length(text, max_model_len)
        return self._encode_literally(text, is_first=False)

    def encode_chat(self, messages: Sequence[Message], max_model_len: int | None = None, turn: Turn = DEFAULT_TURN) -> list[int]:
        """Ids of a conversation under the chat template, up to where the assistant is to speak. Raises TextTooLong as `encode` does."""
        if self._template is None or self._tokenizer is None:
            raise InvalidRequest("This model has no chat template; use /v1/completions.", "messages")
        texts = (text for value in (*messages, *turn.tools, turn.variables) for text in texts_in(value))
        if not any(map(self._any_special.search, texts)):
            rendered = self._template.render(messages, turn)
            self._check_length(rendered, max_model_len)
            return _ids(self._tokenizer, rendered)
        escape = _Escape(self._any_special)
        hidden = replace(
            turn,
            tools=tuple(_with_texts(tool, escape.hide) for tool in turn.tools),
            variables={name: _with_texts(value, escape.hide) for name, value in turn.variables.items()},
        )
        rendered = self._template.render([_with_texts(message, escape.hide) for message in messages], hidden)
        revealed = escape.reveal(rendered)
        if escape.is_hidden_in(revealed):
            raise InvalidRequest("The model's chat template changes a text that holds a special token, so it cannot stay text.", "messages")
        self._check_length(revealed, max_model_len)
        return self._encode_around_special(rendered, escape)

    def detokenizer(self, literals: Mapping[int, str] = MappingProxyType({})) -> Detokenizer | NumberWriter:
        """A fresh one for one answer. Special tokens have no text but for `literals`."""
        return NumberWriter() if self._tokenizer is None else Detokenizer(self, literals)

    def added_ids(self, texts: Iterable[str]) -> dict[str, int]:
        """Those of the texts that are one token of their own beside the vocabulary, special or not."""
        return {text: self._added[text] for text in texts if text in self._added}

    def literals_of(self, texts: Iterable[str]) -> dict[int, str]:
        """Those of the texts that are special tokens, which a detokenizer leaves out."""
        return {self._special[text][0]: text for text in texts if text in self._special}

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
            return byte_level(token)
        return bytes.fromhex(token[3:5]) if _BYTE_TOKEN.fullmatch(token) else None

    def text_of(self, ids: Sequence[int]) -> str:
        """Text of ids, special ones by their names."""
        if self._tokenizer is None:
            return "".join(f" {token_id}" for token_id in ids)
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def token_text(self, token_id: int) -> tuple[str, bytes]:
        """One token by itself, special ones by their names: as text, with U+FFFD for what is no whole character, and as bytes."""
        if token_id not in self._token_texts:
            self._token_texts[token_id] = self._new_token_text(token_id)  # at most one for each of the vocabulary
        return self._token_texts[token_id]

    def _new_token_text(self, token_id: int) -> tuple[str, bytes]:
        if self._tokenizer is None:
            text = f" {token_id}"
            return text, text.encode()
        raw = self.raw_bytes(token_id)
        if raw is None:
            alone, twice = (self._tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
            raw = twice[len(alone) :].encode()  # behind itself: decoders treat the first token of a text differently
        return raw.decode(errors="replace"), raw

    def _check_length(self, text: str, max_model_len: int | None) -> None:
        if max_model_len is None or self._length_bound is None:
            return
        least = self._length_bound.least_tokens(text)
        if least > max_model_len:
            raise TextTooLong(len(text), least, max_model_len)

    def _encode_around_special(self, rendered: str, escape: _Escape) -> list[int]:
        """As the tokenizer would, if it knew which special tokens the template wrote: these, with the white space that they take with
        them, and text between them."""
        ids: list[int] = []
        end = 0
        for match in self._any_special.finditer(rendered):
            token_id, token = self._special[match[0]]
            before = rendered[end : match.start()]
            ids += self._encode_literally(escape.reveal(before.rstrip() if token.lstrip else before), is_first=end == 0)
            ids.append(token_id)
            end = _behind_space(rendered, match.end()) if token.rstrip else match.end()
        return ids + self._encode_literally(escape.reveal(rendered[end:]), is_first=end == 0)

    def _encode_literally(self, text: str, is_first: bool) -> list[int]:
        return _ids(self._literal_tokenizer if is_first else self._inner_tokenizer, text)

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
        self._key = secrets.token_hex(8)
        self._mark = f"\ue000{self._key}:"
        self._hidden: list[str] = []

    def hide(self, text: str) -> str:
        return self._literals.sub(self._hide_one, text)

    def reveal(self, text: str) -> str:
        return re.sub(rf"{self._mark}(\d+)\ue001", lambda match: self._hidden[int(match[1])], text)

    def is_hidden_in(self, text: str) -> bool:
        """Whether something is hidden there that `reveal` did not find: what hid it was changed."""
        return self._key in text

    def _hide_one(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._mark}{len(self._hidden) - 1}\ue001"


# ---------------------------------------------------------------------- tokenizers
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _plain(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()  # some files carry the settings of their training
    tokenizer.no_padding()
    return tokenizer


def _reading_literally(tokenizer_json: str) -> Tokenizer:
    """One to which special tokens are text."""
    tokenizer = _plain(tokenizer_json)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    """A batch of one: other than `encode`, it releases the interpreter lock, and it is quicker since it keeps no offsets."""
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


_SIZE_OF_NUMBER = 4


def texts_in(value: Any) -> Iterator[str]:
    """All texts in something that was JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from texts_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts_in(part)


def size_of(value: Any) -> int:
    """About the characters of something that was JSON."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + size_of(part) for key, part in value.items())
    return sum(map(size_of, value)) if isinstance(value, list) else _SIZE_OF_NUMBER


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same with its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _with_texts(part, change) for key, part in value.items()}
    return [_with_texts(part, change) for part in value] if isinstance(value, list) else value


def _any_of(literals: Iterable[str]) -> re.Pattern[str]:
    """Any of these, the longest first, as the tokenizer decides between them."""
    ordered = sorted(literals, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else re.compile(r"(?!)")


_SPACE = re.compile(r"\s*")


def _behind_space(text: str, start: int) -> int:
    """Where the white space that begins at `start` ends."""
    space = _SPACE.match(text, start)
    assert space is not None
    return space.end()
