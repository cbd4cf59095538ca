"""What a tokenizer.json says of the tokenizer: how few tokens a text can have, which tokens stand for bytes, what is special about a
beginning. Reads what `tokenizers` wrote; tokenises nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


def _parts(entry: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of sequences."""
    if entry is None:
        return []
    return [part for inner in entry[key] for part in _parts(inner, key)] if key in entry else [entry]


def without_first_prefix(spec: dict[str, Any]) -> dict[str, Any] | None:
    """The tokenizer for what stands behind the beginning of a text; None if that is the same one.

    Only Metaspace treats a beginning in its own way: under the scheme "first" it puts a word's mark before it.
    """
    inner: dict[str, Any] = spec | {"pre_tokenizer": copy.deepcopy(spec["pre_tokenizer"])}
    parts = [part for part in _parts(inner["pre_tokenizer"], "pretokenizers") if part.get("prepend_scheme") == "first"]
    for part in parts:
        part["prepend_scheme"] = "never"
    return inner if parts else None


@dataclass(frozen=True)
class LengthBound:
    """How few tokens a text can have, from its length alone."""

    characters_per_token: int
    dropped: tuple[str, ...]  # characters that have no token

    def least_tokens(self, text: str) -> int:
        num_kept = len(text) - sum(text.count(char) for char in self.dropped)
        return -(-num_kept // self.characters_per_token)


def length_bound(spec: dict[str, Any]) -> LengthBound | None:
    """None for a tokenizer that may shorten a text before it looks for tokens, or that may stand one token for anything unknown.

    BPE over bytes, or with a token for every byte, does neither: a token is written with at least as many signs as it stands for
    characters.
    """
    model, added = spec["model"], spec["added_tokens"]
    if (
        model["type"] != "BPE"
        or model["continuing_subword_prefix"]
        or model["end_of_word_suffix"]
        or not all(_keeps_length(part) for part in _parts(spec["normalizer"], "normalizers"))
        or not all(_keeps_characters(part) for part in _parts(spec["pre_tokenizer"], "pretokenizers"))
        or any(token["lstrip"] or token["rstrip"] for token in added)
    ):
        return None
    dropped = _dropped(spec)
    longest = max(map(len, (*model["vocab"], *(token["content"] for token in added))))
    return None if dropped is None else LengthBound(longest, dropped)


def _dropped(spec: dict[str, Any]) -> tuple[str, ...] | None:
    """The characters that have no token; None if they cannot be told. Vocabularies over bytes lack some that training never saw."""
    vocab: dict[str, int] = spec["model"]["vocab"]
    if not any(part["type"] == "ByteLevel" for part in _parts(spec["pre_tokenizer"], "pretokenizers")):
        has_all = spec["model"]["byte_fallback"] and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
        return () if has_all else None
    missing = {byte for sign, byte in _byte_level_table().items() if sign not in vocab}
    if not missing.isdisjoint(range(0x80, 0xC0)):  # each character that is not ASCII has one of these
        return None
    return tuple(chr(byte) for byte in sorted(missing) if byte < 0x80)


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return pattern is not None and len(normalizer["content"]) >= len(pattern)
    return normalizer["type"] in ("Prepend", "NFD")


def _keeps_characters(pre_tokenizer: dict[str, Any]) -> bool:
    if pre_tokenizer["type"] == "Split":
        return str(pre_tokenizer["behavior"]) != "Removed"
    return pre_tokenizer["type"] in ("ByteLevel", "Digits", "Metaspace")


def byte_decoders(decoder: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether all tokens stand for bytes, and whether some do."""
    if decoder is None:
        return False, False
    kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
    return "ByteLevel" in kinds, "ByteFallback" in kinds


def byte_level(token: str) -> bytes:
    """What a token of a vocabulary over bytes stands for."""
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
