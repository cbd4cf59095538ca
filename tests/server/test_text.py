"""Text to ids and back, against the naive way: decode everything, then look."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.errors import ContextLengthExceeded, InvalidRequest, SourceError
from server.detokenize import Detokenizer
from server.template import ChatTemplate, Turn
from server.text import TextTokenizer
from tests.server.conftest import SPECIAL, TEMPLATE, build_tokenizer

TINY = build_tokenizer()
TEXT = TextTokenizer(TINY.to_str(), ChatTemplate(TEMPLATE))
WITH_BOS = TextTokenizer(build_tokenizer(add_bos=True).to_str())


def stream(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


# ---------------------------------------------------------------------- detokenising
@given(st.lists(st.integers(0, TINY.get_vocab_size() + 3)))
def test_pieces_make_the_text(ids: list[int]) -> None:
    assert "".join(stream(TEXT, ids)) == TINY.decode(ids, skip_special_tokens=True)


@given(st.text())
def test_text_survives(text: str) -> None:
    pieces = stream(TEXT, TINY.encode(text, add_special_tokens=False).ids)
    if not any(literal in text for literal in SPECIAL):
        assert "".join(pieces) == text


@given(st.lists(st.integers(3, 258)), st.data())
def test_at_most_one_character_is_held_back(ids: list[int], data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(ids)))
    sent = "".join(stream(TEXT, ids[:end])[:-1])
    naive = TINY.decode(ids[:end], skip_special_tokens=True)
    assert naive == sent or naive == sent + "\ufffd"


def test_a_character_is_never_split() -> None:
    ids = TINY.encode("a\N{GRINNING FACE}b\N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}", add_special_tokens=False).ids
    assert [piece for piece in stream(TEXT, ids) if piece] == list(
        "a\N{GRINNING FACE}b\N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}"
    )


def test_unfinished_bytes_come_out_at_the_end() -> None:
    ids = TINY.encode("\N{GRINNING FACE}", add_special_tokens=False).ids[:-1]
    assert stream(TEXT, ids) == [""] * len(ids) + ["\ufffd"]


def test_garbage_holds_nothing_back() -> None:
    invalid = TINY.get_vocab()["ÿ"]  # byte 0xff
    assert stream(TEXT, [invalid] * 50)[:-1] == ["\ufffd"] * 50


def test_special_tokens_have_no_text() -> None:
    hello = TINY.encode("hello").ids
    assert "".join(stream(TEXT, [1, *hello, 2, 0])) == "hello"


def sentencepiece_like() -> Tokenizer:
    """Words with a leading mark, and bytes for what has no word, as Llama 2 has them."""
    words = ["<unk>", "</s>", "▁the", "▁cat", "s", "▁", "!"]
    vocab = {token: i for i, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


def with_metaspace() -> Tokenizer:
    tokenizer = sentencepiece_like()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def lacking_bytes() -> Tokenizer:
    spec = json.loads(TINY.to_str())
    for sign in ("\u0104", "\u00f1"):  # the signs of bytes 4 and 0xf1
        spec["model"]["vocab"]["unused " + sign] = spec["model"]["vocab"].pop(sign)
    return Tokenizer.from_str(json.dumps(spec))


FALLBACK = sentencepiece_like()
FALLBACK_TEXT = TextTokenizer(FALLBACK.to_str())
METASPACE = with_metaspace()
METASPACE_TEXT = TextTokenizer(METASPACE.to_str(), ChatTemplate("</s>{{ messages[0].content }}</s>"))
LACKING_TEXT = TextTokenizer(lacking_bytes().to_str())


@given(st.lists(st.one_of(st.integers(2, 6).map(lambda i: [i]), st.text(max_size=3).map(lambda t: [7 + b for b in t.encode()]))))
def test_byte_fallback_makes_the_text(runs: list[list[int]]) -> None:
    ids = [2, *(token for run in runs for token in run)]  # a text that begins with a word
    assert "".join(stream(FALLBACK_TEXT, ids)) == FALLBACK.decode(ids)


def test_byte_fallback_keeps_what_was_valid() -> None:
    emoji = [7 + byte for byte in "\N{GRINNING FACE}".encode()]
    assert "".join(stream(FALLBACK_TEXT, [2, *emoji, *emoji[:2]])) == "the\N{GRINNING FACE}\ufffd"


def test_the_cost_of_a_token_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    decode = FALLBACK_TEXT.decode

    def noted(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(FALLBACK_TEXT, "decode", noted)
    stream(FALLBACK_TEXT, [2, 3, 4] * 50)
    assert max(lengths) <= Detokenizer.CONTEXT + 1


# ---------------------------------------------------------------------- prompts
def test_bos_is_added_once() -> None:
    hello = TINY.encode("hello").ids
    assert WITH_BOS.encode("hello") == [0, *hello]
    assert WITH_BOS.encode("<|endoftext|>hello") == [0, *hello]
    assert WITH_BOS.encode("<|endoftext|><|endoftext|>hello") == [0, 0, *hello]
    assert WITH_BOS.encode("") == [0]
    assert TEXT.encode("hello") == hello


def test_a_prompt_may_hold_special_tokens() -> None:
    assert TEXT.encode("<|im_start|>")[0] == 1


@pytest.mark.parametrize("length", [0, 1, 100_000])
def test_a_text_has_one_encoding(length: int) -> None:
    """However it is computed: special tokens, white space and BOS of long texts are those of short ones."""
    text = ("<|im_start|> the other fox\n" * 5000)[:length]
    assert TEXT.encode(text) == TINY.encode(text).ids
    assert WITH_BOS.encode(text) == [0, *TINY.encode(text).ids]


# ---------------------------------------------------------------------- texts that cannot fit
LONGEST = max(map(len, TINY.get_vocab()))


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TextTokenizer(TINY.to_str(), ChatTemplate(TEMPLATE))
    monkeypatch.setattr("server.text._ids", lambda *_, **__: [])
    text.encode("a" * LONGEST * 7, 7)
    for special in ("", SPECIAL[0]):
        with pytest.raises(ContextLengthExceeded, match="at least 8 tokens") as caught:
            text.encode("a" * (LONGEST * 7 + 1), 7)
        assert (caught.value.num_prompt_tokens, caught.value.max_model_len) == (8, 7)
        with pytest.raises(ContextLengthExceeded):
            text.encode_chat([{"role": "user", "content": "a" * LONGEST * 7 + special}], 7)


@given(st.text() | st.lists(st.sampled_from([*SPECIAL, " ", "\x04", "\n", "the quick", "\N{GRINNING FACE}"]), max_size=40).map("".join))
def test_no_text_that_fits_is_refused(content: str) -> None:
    for tokenizer in (TEXT, FALLBACK_TEXT, METASPACE_TEXT, LACKING_TEXT):
        assert tokenizer._length_bound is not None
        num_tokens = len(tokenizer.encode(content))
        assert tokenizer._length_bound.least_tokens(content) <= num_tokens
        assert tokenizer.encode(content, num_tokens) == tokenizer.encode(content)


def test_a_vocabulary_may_lack_bytes() -> None:
    """As SmolLM2's does; such characters vanish, however many there are."""
    assert LACKING_TEXT.encode("\x04" * 100_000 + "a", 1) == LACKING_TEXT.encode("a")


def with_normalizer(normalizer: Any) -> Tokenizer:
    tokenizer = build_tokenizer()
    tokenizer.normalizer = normalizer
    return tokenizer


def with_pre_tokenizer(*before: Any) -> Tokenizer:
    tokenizer = build_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, tokenizer.pre_tokenizer])
    return tokenizer


def with_added(token: AddedToken) -> Tokenizer:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens([token])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "is_bound"),
    [
        (TINY, True),
        (with_normalizer(normalizers.NFD()), True),
        (with_normalizer(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])), True),
        (with_normalizer(normalizers.NFC()), False),
        (with_normalizer(normalizers.Sequence([normalizers.NFD(), normalizers.Strip()])), False),
        (with_normalizer(normalizers.Replace("ab", "c")), False),
        (with_normalizer(normalizers.Replace(Regex(" +"), " ")), False),
        (with_pre_tokenizer(pre_tokenizers.Digits(), pre_tokenizers.Split("x", "isolated")), True),
        (with_pre_tokenizer(pre_tokenizers.Split(" ", "removed")), False),
        (with_pre_tokenizer(pre_tokenizers.WhitespaceSplit()), False),
        (with_added(AddedToken("<|turn|>", rstrip=True)), False),
        (Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")), False),
        (Tokenizer(models.BPE({"a": 0}, [])), False),
    ],
)
def test_only_tokenizers_that_keep_all_characters_are_bounded(tokenizer: Tokenizer, is_bound: bool) -> None:
    assert (TextTokenizer(tokenizer.to_str())._length_bound is not None) == is_bound


# ---------------------------------------------------------------------- chat
def test_a_chat_is_rendered_and_encoded() -> None:
    expected = TINY.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).ids
    assert TEXT.encode_chat([{"role": "user", "content": "hello"}]) == expected


TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the "}]


@pytest.mark.parametrize("special", ["", SPECIAL[0]])
def test_the_last_message_can_be_continued(special: str) -> None:
    """White space at its end included, and a special token's literal in it staying text."""
    messages = [TALK[0], {"role": "assistant", "content": f"the{special} "}]
    ids = TEXT.encode_chat(messages, turn=Turn(continues_last=True))
    want = f"<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe{special} "
    assert TINY.decode(ids, skip_special_tokens=False) == want
    assert [token for token in ids if token < 3] == [1, 2, 1]


def test_a_template_that_hides_the_last_message_cannot_continue_it() -> None:
    text = TextTokenizer(TINY.to_str(), ChatTemplate("{{ messages[0].content }}"))
    with pytest.raises(InvalidRequest, match="does not show the last message"):
        text.encode_chat(TALK, turn=Turn(continues_last=True))


def test_the_answer_need_not_be_opened() -> None:
    ids = TEXT.encode_chat(TALK[:1], turn=Turn(opens_answer=False))
    assert TINY.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nhello<|im_end|>\n"


def test_texts_that_a_template_changes_are_refused_where_they_hold_special_tokens() -> None:
    text = TextTokenizer(TINY.to_str(), ChatTemplate("{{ words }}|{{ messages[0].content }}"))
    assert "be brief" in TINY.decode(text.encode_chat(TALK[:1], turn=Turn(variables={"words": ["be brief"]})))
    for words in ([SPECIAL[0]], {SPECIAL[0]: 1}):
        with pytest.raises(InvalidRequest, match="cannot stay text"):
            text.encode_chat(TALK[:1], turn=Turn(variables={"words": words}))


def test_a_last_message_that_is_shown_twice_ends_where_it_is_shown_last() -> None:
    text = TextTokenizer(TINY.to_str(), ChatTemplate("{{ messages[-1].content }}|{{ messages[-1].content }}!"))
    ids = text.encode_chat(TALK, turn=Turn(continues_last=True))
    assert TINY.decode(ids).endswith("|the ")


def test_a_token_by_itself_is_what_it_adds_to_a_text() -> None:
    for text in (TEXT, FALLBACK_TEXT, METASPACE_TEXT):
        ids = [i for i in text.encode("the cat") if i not in text.special_ids]
        assert "".join(text.token_text(i)[0] for i in ids).strip() == "the cat"


def test_a_template_gets_further_variables_whose_special_tokens_stay_text() -> None:
    text = TextTokenizer(TINY.to_str(), ChatTemplate("{{ style.words[0] }}|{{ messages[0].content }}{% if loud %}!{% endif %}"))
    for words in ("be brief", SPECIAL[0]):
        ids = text.encode_chat(TALK[:1], turn=Turn(variables={"style": {"words": [words]}, "loud": True}))
        assert TINY.decode(ids, skip_special_tokens=False) == f"{words}|hello!"
        assert min(ids) > 2


@given(
    st.lists(st.one_of(st.sampled_from([*SPECIAL, "<think>", "<", "<|im_", "\ue000", "\ue0010"]), st.text(max_size=4)), max_size=6).map(
        "".join
    )
)
@settings(max_examples=200)
def test_special_tokens_of_a_user_stay_text(content: str) -> None:
    ids = TEXT.encode_chat([{"role": "user", "content": content}])
    assert [token for token in ids if token < 3] == [1, 2, 1]
    assert TINY.decode(ids, skip_special_tokens=False) == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


@given(st.text(max_size=30))
def test_both_ways_of_encoding_a_chat_agree(content: str) -> None:
    """A literal in one message changes nothing about another one."""
    if any(literal in content for literal in SPECIAL):
        return
    plain = TEXT.encode_chat([{"role": "user", "content": content}])
    careful = TEXT.encode_chat([{"role": "user", "content": content}, {"role": "user", "content": SPECIAL[0]}])
    generation = len(TINY.encode("<|im_start|>assistant\n").ids)
    assert careful[: len(plain) - generation] == plain[:-generation]


def test_white_space_goes_with_a_token_that_takes_it() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|turn|>", special=True, rstrip=True)])
    text = TextTokenizer(tokenizer.to_str(), ChatTemplate("<|turn|>\n{{ messages[0].content }}"))
    turn = tokenizer.token_to_id("<|turn|>")
    assert text.encode_chat([{"role": "user", "content": "hello"}]) == [turn, *TINY.encode("hello").ids]
    careful = text.encode_chat([{"role": "user", "content": "<|turn|>"}])
    assert careful[0] == turn
    assert turn not in careful[1:]
    assert tokenizer.decode(careful[1:]) == "<|turn|>"


def test_the_text_behind_a_special_token_is_no_beginning() -> None:
    """Metaspace puts a mark before a text, and under the scheme "first" not before what follows a special token."""
    inner = METASPACE_TEXT.encode_chat([{"role": "user", "content": "the cat"}])
    assert inner == METASPACE.encode("</s>the cat</s>", add_special_tokens=False).ids
    careful = METASPACE_TEXT.encode_chat([{"role": "user", "content": "the cat</s>"}])
    assert careful[: len(inner) - 1] == inner[:-1]
    assert METASPACE.decode(careful, skip_special_tokens=False) == "</s>the cat</s></s>"
    template = ChatTemplate("{{ messages[0].content }}</s>{{ messages[1].content }}")
    text = TextTokenizer(METASPACE.to_str(), template)
    first = text.encode_chat([{"role": "user", "content": "the cat"}, {"role": "user", "content": "</s>"}])
    beginning = METASPACE.encode("the cat</s>", add_special_tokens=False).ids
    assert first[: len(beginning)] == beginning
    assert beginning[:-1] != inner[1:-1]


@pytest.mark.timeout(30)
def test_white_space_before_a_token_that_takes_it_is_found_in_one_pass() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|turn|>", special=True, lstrip=True, rstrip=True)])
    text = TextTokenizer(tokenizer.to_str(), ChatTemplate("a \n<|turn|>\n {{ messages[0].content }}"))
    turn = tokenizer.token_to_id("<|turn|>")
    a = tokenizer.token_to_id("a")
    spaces = " " * 500_000  # a pattern that begins with white space tries each of them, up to the end
    careful = text.encode_chat([{"role": "user", "content": f"<|turn|>{spaces}b"}])
    assert careful[:2] == [a, turn]
    assert tokenizer.decode(careful[2:]) == f"<|turn|>{spaces}b"


def test_a_template_that_refuses_is_the_clients_mistake() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(InvalidRequest, match="must come first") as caught:
        TEXT.encode_chat(messages)
    assert caught.value.param == "messages"
    for source in ("{{ messages[7].content.x }}", "{{ 1 + messages[0].content }}", "{{ ''.__class__.__mro__ }}{{ 1/0 }}"):
        with pytest.raises(InvalidRequest, match="refuses"):
            ChatTemplate(source).render(messages)


def test_templates_have_what_transformers_gives_them() -> None:
    loop = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    source = loop + "{{ bos_token }}{{ strftime_now('%Y') | length }}"
    rendered = ChatTemplate(source, {"bos_token": "<s>"}).render([{"role": "user", "content": "<é>"}, {"role": "user", "content": "2"}])
    assert rendered == '{"role": "user", "content": "<é>"}<s>4'


def test_developer_is_system_unless_the_template_knows_it() -> None:
    message = [{"role": "developer", "content": ""}]
    assert ChatTemplate("{{ messages[0].role }}").render(message) == "system"
    assert ChatTemplate("{{ messages[0].role }}{# developer #}").render(message) == "developer"


# ---------------------------------------------------------------------- folders
def test_a_folder_is_read(folder: Path) -> None:
    text = TextTokenizer.from_folder(folder)
    assert text.has_chat_template
    assert text.encode_chat([{"role": "user", "content": "x"}]) == TEXT.encode_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "entry", ["T{{ bos_token }}", [{"name": "rag", "template": "no"}, {"name": "default", "template": "T{{ bos_token }}"}]]
)
def test_templates_in_the_config(tmp_path: Path, entry: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry, "bos_token": "<s>", "pad_token": None}), "utf-8")
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render([]) == "T<s>"


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    text = TextTokenizer.from_folder(tmp_path)
    assert not text.has_chat_template
    assert stream(text, [3, 14, 1]) == [" 3", " 14", " 1", ""]
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        text.encode("hello")
    with pytest.raises(InvalidRequest, match="no chat template"):
        text.encode_chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{"), ("chat_template.jinja", "{% if %}"), ("tokenizer_config.json", "[1")]
)
def test_a_broken_folder_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(SourceError):
        TextTokenizer.from_folder(tmp_path)
