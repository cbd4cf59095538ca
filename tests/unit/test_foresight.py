"""What is known before any model runs: grammars' states, what they force, and where an answer stands in its prediction."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from engine.draft.foresight import First, Forced, NoForesight
from engine.draft.prediction import Prediction
from engine.grammar.automaton import LONGEST, Automata, Vocabulary
from engine.plan import Foreseen
from engine.request import Choice, Request, SamplingParams
from engine.sequence import Sequence
from tests.reference import predicted
from tests.server.conftest import build_tokenizer

LETTERS, END, OTHER_END, SIZE = 26, 26, 27, 29


class _Letters:
    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([ord("a") + i]) for i in range(LETTERS)), b"<end>", b"<other end>", b"abc")
    special_token_ids = (END, OTHER_END)

    def __call__(self, text: bytes | str) -> list[int]:
        return [byte - ord("a") for byte in (text.encode() if isinstance(text, str) else text)]


VOCABULARY = Vocabulary(LLTokenizer(TokenizerWrapper(_Letters())), (END,))


def ids(text: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in text]


def sequence(pattern: str | None = None, prediction: str = "", answer: str = "", stops: tuple[int, ...] = (END,)) -> Sequence:
    request = Request(
        id="r",
        prompt_ids=(1, 2, 3),
        sampling=SamplingParams(max_tokens=99, stop_token_ids=stops),
        grammar=None if pattern is None else LLMatcher.grammar_from_regex(pattern),
        prediction_ids=tuple(ids(prediction)),
    )
    return Sequence(request, Choice(output_ids=tuple(ids(answer))))


def allowed(automata: Automata, seq: Sequence, drafts: list[int]) -> set[int]:
    mask = automata.mask(seq, drafts)
    assert mask is not None
    return tokens_in(mask) & set(range(END + 2))


def tokens_in(mask: bytes | None) -> set[int]:
    assert mask is not None
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist())


# ---------------------------------------------------------------------- grammars
def test_a_mask_follows_text_and_drafts_whatever_was_asked_before() -> None:
    """Masks in any order, as drafts come and go, are those of a fresh automaton."""
    rng, automata, seq = random.Random(1), Automata(VOCABULARY, SIZE), sequence("(a[bc]d)*e|f+")
    for _ in range(200):
        drafts = [int(i) for i in ids("".join(rng.choice(["abd", "acd", "e", "f", "ab", "x", "ff"]) for _ in range(rng.randrange(3))))]
        fresh = sequence("(a[bc]d)*e|f+", answer="".join(chr(ord("a") + t) for t in seq.tokens[3:]))
        want, got = Automata(VOCABULARY, SIZE).mask(fresh, drafts), automata.mask(seq, drafts)
        assert (want is None) == (got is None)
        assert want == got
        if rng.random() < 0.2 and len(seq.tokens) < 30 and drafts and drafts[-1] == 3:
            seq.tokens.extend(drafts)  # they stood


def test_where_an_end_may_come_every_end_of_the_request_may() -> None:
    automata = Automata(VOCABULARY, SIZE)
    seq = sequence("ab?", stops=(END, OTHER_END))
    assert allowed(automata, seq, []) == {0}
    assert allowed(automata, seq, ids("a")) == {1, END, OTHER_END}
    assert allowed(automata, seq, ids("ab")) == {END, OTHER_END}


def test_behind_a_draft_that_cannot_stand_there_is_no_telling() -> None:
    automata, seq = Automata(VOCABULARY, SIZE), sequence("ab*")
    assert automata.mask(seq, ids("b")) is None
    assert automata.mask(seq, [0, END]) is None
    assert allowed(automata, seq, ids("a")) == {1, END}, "and that breaks nothing"
    assert not automata.is_broken(seq)


def test_what_alone_may_come_is_forced_and_nothing_else() -> None:
    automata = Automata(VOCABULARY, SIZE)
    forced, seq = Forced(automata.next), sequence("xy[pq]r(st)?")
    for drafts, token in (("", "x"), ("x", "y"), ("xy", None), ("xyp", "r"), ("xypr", None), ("xyprs", "t"), ("xyprst", None), ("a", None)):
        want = None if token is None else Foreseen(ids(token)[0])
        assert forced.next(seq, ids(drafts)) == want
        mask = automata.mask(seq, ids(drafts))
        assert want is None or tokens_in(mask) == {want.token_id}
    assert not forced.applies(sequence())


def test_a_token_of_several_letters_is_forced_alone() -> None:
    """Else a mask would leave the first letter, too, and the draft could be refused."""
    automata, seq = Automata(VOCABULARY, SIZE), sequence("abcz")
    token = automata.next(seq, [])
    assert tokens_in(automata.mask(seq, [])) == {token}


def test_a_grammar_that_cannot_be_followed_breaks_its_sequence_alone() -> None:
    automata, seq = Automata(VOCABULARY, SIZE), sequence()
    broken = sequence("ab", answer="x")  # as though another grammar had written it
    assert automata.mask(broken, []) is None
    assert automata.is_broken(broken)
    assert not automata.is_broken(seq)


def test_a_place_behind_a_draft_that_leads_nowhere_breaks_nothing_before_it_stands() -> None:
    """No token has the letter that must follow x; the answer may still go elsewhere, or take x and end there."""
    automata, seq = Automata(VOCABULARY, SIZE), sequence("(a|bx[YZ])*")
    for _ in range(2):  # whoever drafts asks, and then whoever verifies
        assert allowed(automata, seq, ids("a")) == {0, 1, END}
        assert automata.mask(seq, ids("abx")) is None
        assert automata.mask(seq, ids("abxa")) is None
        assert allowed(automata, seq, ids("ab")) == {ord("x") - ord("a")}
    assert not automata.is_broken(seq)
    assert automata.num_standing(seq, ids("aba")) == 3, "another draft fell in front of it"
    assert automata.num_standing(seq, ids("abxa")) == 3
    seq.tokens.extend(ids("aa"))
    assert automata.num_standing(seq, ids("abxa")) == 4, "it is about another place now"
    assert allowed(automata, seq, []) == {0, 1, END}
    seq.tokens.extend(ids("bx"))
    assert automata.mask(seq, []) is None
    assert automata.is_broken(seq)


# ---------------------------------------------------------------------- predictions
@pytest.mark.parametrize("seed", range(30))
def test_an_answer_is_read_along_its_prediction_as_the_oracle_does(seed: int) -> None:
    """With changes, things left out and things put in; drafts are text like any other."""
    rng = random.Random(seed)
    text = "".join(rng.choice("abcd") for _ in range(40))
    answer = list(text)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(answer))
        answer[at : at + rng.randrange(3)] = rng.choices("abcdxy", k=rng.randrange(3))
    foresight, seq = Prediction(), sequence(prediction=text)
    written = ids("".join(answer))
    while len(seq.tokens) - 3 < len(written):
        done = len(seq.tokens) - 3
        for num_drafts in range(4):
            drafts = written[done : done + num_drafts]
            want = predicted([*seq.tokens, *drafts], seq.request)
            assert foresight.next(seq, drafts) == (None if want is None else Foreseen(want, is_predicted=True))
        seq.tokens.extend(written[done : done + rng.randrange(1, 4)])


def test_a_changed_name_costs_one_token() -> None:
    foresight, seq = Prediction(), sequence(prediction="thequickbrownfox", answer="theslick")
    assert foresight.next(seq, []) == Foreseen(ids("b")[0], is_predicted=True)
    seq = sequence(prediction="thequickbrownfox", answer="thezu")
    assert foresight.next(seq, []) == Foreseen(ids("i")[0], is_predicted=True), "a letter near by is enough"
    assert foresight.next(sequence(prediction="abc", answer="abc"), []) is None, "behind its end there is nothing"


def test_the_first_that_can_tell_does() -> None:
    automata = Automata(VOCABULARY, SIZE)
    both = First((NoForesight(), Forced(automata.next), Prediction()))
    seq = sequence("x[ab]y", prediction="xay")
    assert [both.next(seq, ids(text)) for text in ("", "x", "xa")] == [Foreseen(23), Foreseen(0, is_predicted=True), Foreseen(24)]
    both.forget(seq)
    assert not both.applies(sequence())


# ---------------------------------------------------------------------- grammars that are too much
@pytest.mark.parametrize(
    "grammar",
    [
        "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(9000)) + 'a9000: "x"\n',
        "start: A0\n" + "".join(f"A{i}: A{i + 1}\n" for i in range(8000)) + "A8000: /x/\n",
    ],
)
def test_a_long_chain_of_references_ends_no_process(grammar: str) -> None:
    """The parser follows it by recursion, which would run out of an ordinary stack."""
    assert len(grammar) < LONGEST
    assert isinstance(VOCABULARY.mistake_in(grammar), str)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("start: /(a{1000}){1000}/", "too many"),
        ('start: x\nx[stop="c"]: /[a-z]+/', "rollback"),
        ("start: x\nx[max_tokens=3]: /[a-z]+/", "rollback"),
        ('start: start "a"', "NoExtension"),
        ("start: <[999999]>", "too large"),
        ('start: <|nobody|> "a"', "unknown special token"),
        ("start: " + " | ".join(f'"{i}"' for i in range(90_000)), "characters"),
    ],
)
def test_what_would_fail_at_its_first_token_is_known_before(grammar: str, reason: str) -> None:
    assert reason in VOCABULARY.mistake_in(grammar)


def test_a_worn_parser_is_made_anew() -> None:
    """Copies share states, of which there are only so many: what others used up breaks nobody's answer."""
    rng, grammar = random.Random(2), "(a|b)*a(a|b){60}c"
    automata = Automata(VOCABULARY, SIZE)
    for _ in range(30):
        seq = sequence(grammar)
        for _ in range(1500):
            assert allowed(automata, seq, []) >= {0, 1}
            seq.tokens.append(rng.randrange(2))
        assert not automata.is_broken(seq)


def test_ends_that_a_tokenizer_does_not_have_are_left_out(tmp_path: Path) -> None:
    build_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for given, known in (((2,), (2,)), ((2, 10**6), (2,)), ((10**6,), None), ((), None)):
        vocabulary = Vocabulary.from_folder(tmp_path, given)
        assert (vocabulary.end_token_ids if vocabulary is not None else None) == known
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "utf-8"
    )
    assert Vocabulary.from_folder(tmp_path, (0,)) is None, "and what cannot be read costs grammars, not the start"
