"""The index behind prompt lookup and copying, against a search of the whole text, and what copying makes of a row."""

from __future__ import annotations

import random

import pytest
import torch

from engine.draft.copying import LENGTHS, Copying
from engine.draft.lookup import SuffixIndex
from engine.draft.model import _confidences
from tests.reference import NaiveCopying
from tests.unit.factories import make_sequence


def searched(text: list[int], lengths: tuple[int, ...]) -> int | None:
    for n in lengths:
        for place in range(len(text) - 1, n - 1, -1):
            if text[place - n : place] == text[-n:]:
                return place
    return None


@pytest.mark.parametrize("lengths", [(1,), (3, 2, 1), (4, 2), (5, 2)])
def test_the_index_finds_what_a_search_does_wherever_drafts_begin(lengths: tuple[int, ...]) -> None:
    draw, found = random.Random(str(lengths)), 0
    for _ in range(200):
        text = draw.choices(range(3), k=draw.randint(1, 24))
        index = SuffixIndex(lengths)
        for num_tokens in range(1, len(text) + 1):  # grows as a sequence does; the rest are drafts
            index.extend(text[:num_tokens])
            place = index.follower(text[:num_tokens], text[num_tokens:])
            assert place == searched(text, lengths), (text, num_tokens)
            found += place is not None
    assert found > 1000


def test_rows_are_mixed_as_by_hand() -> None:
    draw, changed = random.Random(3), 0
    for doubt in (0.3, 2.0):
        copying = Copying(doubt)
        for _ in range(100):
            text = draw.choices(range(4), k=draw.randint(2, 40))
            num_tokens = draw.randint(1, len(text))
            logits = torch.tensor([[draw.gauss(0, 2) for _ in range(6)] for _ in range(2)], dtype=torch.float64)
            seq = make_sequence(tuple(text[:num_tokens]))
            want = [NaiveCopying._mixed(tuple(row.tolist()), tuple(text), doubt) for row in logits]
            got, total = copying.mixed(logits.clone(), [seq, seq], [text[num_tokens:]] * 2)
            torch.testing.assert_close(got.softmax(-1), torch.tensor(want, dtype=torch.float64).softmax(-1), rtol=0, atol=1e-12)
            changed += not torch.equal(got, logits)
            assert total is None or torch.allclose(total, got.logsumexp(-1), rtol=0, atol=1e-12)
            assert (total is None) == torch.equal(got, logits), "known where something was mixed into all"
            own, total = copying.mixed(logits.clone(), [seq, make_sequence((0,))], [text[num_tokens:], []])
            assert total is None, "nothing could be mixed into the second"
            assert torch.equal(own[0], got[0])
            assert torch.equal(own[1], logits[1])
    assert changed > 50
    assert LENGTHS == (4, 2), "the oracle knows these"


def test_a_sequence_that_left_is_forgotten() -> None:
    copying, seq = Copying(1.0), make_sequence((1, 2, 3, 1, 2))
    copying.mixed(torch.zeros(1, 5), [seq], [[]])
    copying.forget(seq)
    assert not copying._indexes


def test_confidences_are_the_largest_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    want = pytest.approx([*logits[:1].softmax(-1).amax(-1).tolist(), 1.0], abs=1e-12)
    assert _confidences(logits, None) == want
    assert _confidences(logits, logits.logsumexp(-1)) == want
    assert max(_confidences(logits, logits.logsumexp(-1) - 1e-9)) == 1.0, "more would be taken for a draft that was foreseen"
