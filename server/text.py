"""Text to token ids and back: prompts, chat templates, incremental detokenising, stop strings.

Uses `tokenizers` and jinja2 directly; transformers would load torch into the server. Knows nothing of HTTP or of the engine's work.
Raises InvalidRequest for what a client's text is to blame for, and SourceError for files that cannot be used.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from engine.errors import InvalidRequest, SourceError

Message = dict[str, str]  # role and content


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


class ChatTemplate:
    """A model's jinja template, compiled in the sandbox."""

    def __init__(self, source: str, variables: dict[str, str] | None = None):
        """`variables` are bos_token and its kin. Raises SourceError for a template that cannot be parsed."""
        self._variables = variables or {}
        self.knows_developer = "developer" in source  # otherwise the role is handed over as "system"
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise SourceError(f"The model's chat template cannot be parsed: {error}") from error

    @classmethod
    def from_folder(cls, path: Path) -> ChatTemplate | None:
        """The template of a folder in the transformers format; None if it has none."""
        config_path, template_path = path / "tokenizer_config.json", path / "chat_template.jinja"
        config: dict[str, Any] = json.loads(config_path.read_text("utf-8")) if config_path.exists() else {}
        source = template_path.read_text("utf-8") if template_path.exists() else _default_template(config.get("chat_template"))
        if source is None:
            return None
        tokens = {key: value["content"] if isinstance(value, dict) else value for key, value in config.items() if key.endswith("_token")}
        return cls(source, {key: value for key, value in tokens.items() if isinstance(value, str)})

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt as text. Raises InvalidRequest if the template refuses the messages."""
        try:
            return self._template.render(
                messages=[self._with_known_role(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._variables,
            )
        except Exception as error:  # a template is foreign code; whatever it raises is about these messages
            raise InvalidRequest(f"The model's chat template refuses these messages: {error}", "messages") from error

    def _with_known_role(self, message: Message) -> Message:
        if message["role"] == "developer" and not self.knows_developer:
            return {**message, "role": "system"}
        return message


class Detokenizer:
    """Token ids of one answer to text, piece by piece. The pieces together are the text.

    Tokens that stand for bytes go through an incremental UTF-8 decoder, which holds back at most the three bytes of an unfinished
    character; what turns out not to be UTF-8 becomes U+FFFD. Other tokens are decoded behind a few of their predecessors, since
    some decoders treat the first token of a text differently. The cost of a token does not depend on how many came before.
    """

    CONTEXT = 6  # tokens

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: deque[int] = deque(maxlen=self.CONTEXT)

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        if token_id in self._tokenizer.special_ids:
            return ""
        raw = self._tokenizer.raw_bytes(token_id)
        text = self._utf8.decode(raw) if raw is not None else self.flush() + self._behind_context(token_id)
        self._context.append(token_id)
        return text

    def flush(self) -> str:
        """What is held back, when nothing follows."""
        return self._utf8.decode(b"", final=True)

    def _behind_context(self, token_id: int) -> str:
        before = self._tokenizer.decode(self._context) if self._context else ""
        return self._tokenizer.decode([*self._context, token_id])[len(before) :]


class NumberWriter:
    """In place of a Detokenizer for a model without a tokenizer: an answer is the decimal token ids, each with a space before it."""

    def push(self, token_id: int) -> str:
        return f" {token_id}"

    def flush(self) -> str:
        return ""


class StopScanner:
    """Finds the first stop string to be completed in a text that comes in pieces, and never lets a part of it out.

    One Knuth-Morris-Pratt automaton a stop string: its state is how many characters of the string the text ends with, which is also
    what must be held back. If two strings end at the same character, the longer one counts.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The text that may go out. After a stop was found, what stood before it, and then nothing more."""
        if self.is_stopped or not self._stops:
            return "" if self.is_stopped else text
        text, begin = self._held + text, len(self._held)
        for end in range(begin, len(text)):
            found = self._advance(text[end])
            if found:
                self.is_stopped, self._held = True, ""
                return text[: end + 1 - found]
        kept = len(text) - max(self._matched)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """What is held back, when nothing follows."""
        text, self._held = self._held, ""
        return text

    def _advance(self, char: str) -> int:
        """Feed one character; length of the longest stop string that it completes."""
        found = 0
        for i, (stop, borders) in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = borders[matched - 1]
            matched += stop[matched] == char
            self._matched[i] = matched
            if matched == len(stop):
                found = max(found, matched)
        return found


def _borders(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = borders[length - 1]
        length += pattern[i] == pattern[length]
        borders[i] = length
    return borders


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


# ---------------------------------------------------------------------- jinja
class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; for a prompt it is transparent."""

    tags = {"generation"}  # noqa: RUF012  # declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # noqa: DTZ005  # templates want local time
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _default_template(entry: Any) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones."""
    if isinstance(entry, list):
        named = {item["name"]: item["template"] for item in entry}
        return named.get("default") or next(iter(named.values()), None)
    return entry if isinstance(entry, str) else None
