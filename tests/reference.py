"""The oracles: the naive way to make an answer, against which every option of the engine is held, token for token.

No cache, no batch, no window, no paging: the model's own forward over the whole text so far, for every token. Numbers and
distributions are written a second time here, in plain Python, so that a mistake in the engine's does not hide.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import regex
import torch

from engine.request import Request, SamplingParams

Row = tuple[float, ...]
DRAFT, ACCEPT, RECOVER = 1, 2, 3


@dataclass(frozen=True)
class Pair:
    """Both models' rows at one position: raw (temperature 1) and as they are sampled from."""

    raw_q: Row
    raw_p: Row
    q: Row
    p: Row
    is_greedy: bool = False

    @property
    def distance(self) -> float:
        return min(1.0, sum(max(0.0, a - b) for a, b in zip(self.q, self.p, strict=True)))

    def everywhere(self, kept: bool) -> list[bool]:
        return [kept] * len(self.p)


KeepSet = Callable[[Pair, float], list[bool]]
KEEPS: Mapping[str, KeepSet] = {
    "exact": lambda at, alpha: at.everywhere(False),
    "lossy": lambda at, alpha: [at.is_greedy and x >= (1 - alpha) * max(at.raw_p) for x in at.raw_p],
    "chow": lambda at, alpha: at.everywhere(max(at.raw_q) >= 1 - alpha),
    "diff": lambda at, alpha: at.everywhere(max(at.raw_q) >= max(at.raw_p) - alpha),
    "opt": lambda at, alpha: at.everywhere(max(at.raw_q) >= max(at.raw_p) - alpha * at.distance),
    "token_v1": lambda at, alpha: [x >= max(at.raw_p) - alpha for x in at.raw_q],
    "token_v2": lambda at, alpha: [x >= max(at.raw_p) - alpha for x in at.raw_p],
    "token_v3": lambda at, alpha: [x >= (1 - alpha) * max(at.raw_p) for x in at.raw_p],
    "chow_log": lambda at, alpha: at.everywhere(entropy(at.raw_q) <= alpha),
    "diff_log": lambda at, alpha: at.everywhere(entropy(at.raw_q) <= entropy(at.raw_p) + alpha),
    "bild": lambda at, alpha: at.everywhere(at.distance <= alpha),
    "keep_none": lambda at, alpha: at.everywhere(False),
    "keep_all": lambda at, alpha: at.everywhere(True),
}
NEEDS_NO_Q = {"exact", "token_v2", "token_v3", "keep_none"}


def entropy(row: Row) -> float:
    return -sum(x * math.log(x) for x in row if x > 0)


def pi_of(rule: str, alpha: float, at: Pair) -> Row:
    """What a position's token is to follow, written out."""
    if rule == "lossy" and not at.is_greedy:
        kept = [min(a, b / (1 - alpha)) if alpha < 1 else a * (b > 0) for a, b in zip(at.q, at.p, strict=True)]
        missing = [max(0.0, b - a) for a, b in zip(at.q, at.p, strict=True)]
        share = max(0.0, 1 - sum(kept)) / (sum(missing) or 1)
        return tuple(k + share * m for k, m in zip(kept, missing, strict=True))
    keep = [k and x > 0 for k, x in zip(KEEPS[rule](at, alpha), at.raw_p, strict=True)]
    eta = max(0.0, 1 - sum(a for a, k in zip(at.q, keep, strict=True) if k))
    return tuple(a * k + eta * b for a, b, k in zip(at.q, at.p, keep, strict=True))


class NaiveModel:
    """A transformers model, asked for one next-token row at a time."""

    def __init__(self, model: Any, context: int = 10**9):
        self.context = context  # the longest text that it can give a row for
        self._rows: Callable[[tuple[int, ...]], Row] = lru_cache(maxsize=None)(lambda tokens: self._logits(model, tokens))

    def logits(self, tokens: list[int]) -> Row:
        return self._rows(tuple(tokens))

    @staticmethod
    @torch.inference_mode()
    def _logits(model: Any, tokens: tuple[int, ...]) -> Row:
        return tuple(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].tolist())


class NaiveCopying(NaiveModel):
    """A model whose rows are mixed with what followed the last 4, else 2 tokens when they last occurred. The text is searched anew."""

    def __init__(self, model: NaiveModel, doubt: float):
        self.context = model.context
        self._rows = lru_cache(maxsize=None)(lambda tokens: self._mixed(model.logits(list(tokens)), tokens, doubt))

    @staticmethod
    def _mixed(logits: Row, tokens: tuple[int, ...], doubt: float) -> Row:
        for n in (4, 2):
            for place in range(len(tokens) - 1, n - 1, -1):
                if tokens[place - n : place] == tokens[-n:]:
                    length = max(m for m in range(n, 17) if m <= place and tokens[place - m : place] == tokens[-m:])
                    # w = L / (L + doubt) of the distribution, so w / (1 - w) = L / doubt times all other weights together
                    weights = [math.exp(x) for x in logits]
                    weights[tokens[place]] += length / doubt * sum(weights)
                    return tuple(math.log(x) if x else -1e4 for x in weights)  # as a token that is never drafted
        return logits


def softmax(logits: Row, temperature: float = 1.0) -> Row:
    return tuple(torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0).tolist())


def processed(logits: Row, sampling: SamplingParams) -> Row:
    """Temperature, top-k, top-p, min-p, the slow way."""
    if sampling.temperature < 1e-5:
        best = max(range(len(logits)), key=lambda i: logits[i])
        return tuple(float(i == best) for i in range(len(logits)))
    probs = list(softmax(logits, sampling.temperature))
    ranked = sorted(probs, reverse=True)
    threshold = sampling.min_p * ranked[0]
    if sampling.top_k:
        threshold = max(threshold, ranked[min(sampling.top_k, len(ranked)) - 1])
        ranked = ranked[: sampling.top_k]
    if sampling.top_p < 1:
        mass, goal = 0.0, sampling.top_p * sum(ranked)
        for x in ranked:
            mass += x
            if mass >= goal:
                threshold = max(threshold, x)
                break
    kept = [x if x >= threshold else 0.0 for x in probs]
    return tuple(x / sum(kept) for x in kept)


def uniform(seed: int, choice: int, position: int, purpose: int) -> float:
    """SplitMix64 over (seed, choice) and (position, purpose), in Python's integers."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key = int.from_bytes(hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest(), "little")
    gamma = 0x9E3779B97F4A7C15
    return (mix(key ^ mix(((position * 4 + purpose) * gamma + gamma) & mask)) >> 11) / 2**53


def draw(weights: list[float] | Row, u: float) -> int:
    goal, total = u * sum(weights), 0.0
    for i, w in enumerate(weights):
        total += w
        if goal < total:
            return i
    return max(i for i, w in enumerate(weights) if w > 0)


def masked(tokens: list[int], logits: Row, request: Request) -> Row:
    """No end in front of min_tokens."""
    sampling = request.sampling
    is_early = len(tokens) - len(request.prompt_ids) < sampling.min_tokens
    return tuple(-math.inf if is_early and i in sampling.stop_token_ids else x for i, x in enumerate(logits))


def penalised(tokens: list[int], logits: Row, request: Request) -> Row:
    """Bias, then repetition, then frequency and presence."""
    sampling, emitted, row = request.sampling, tokens[len(request.prompt_ids) :], list(logits)
    for i in range(len(row)):
        row[i] += sampling.logit_bias.get(i, 0.0)
        if i in tokens:
            row[i] *= 1 / sampling.repetition_penalty if row[i] > 0 else sampling.repetition_penalty
        if i in emitted:
            row[i] -= emitted.count(i) * sampling.frequency_penalty + sampling.presence_penalty
    return tuple(row)


Change = Callable[[list[int], Row], Row]  # the text so far and logits, to logits


def unchanged(tokens: list[int], logits: Row) -> Row:
    return logits


def spelled(tokens: list[int]) -> str:
    """The text of the tiny vocabulary: a letter a token."""
    return "".join(chr(ord("a") + token) for token in tokens)


def ruled(pattern: str, request: Request, end: int) -> Change:
    """What a regular expression leaves of a row: tokens that some answer goes on with, and the end where one is complete."""

    def change(tokens: list[int], logits: Row) -> Row:
        text = spelled(tokens[len(request.prompt_ids) :])
        is_done = regex.fullmatch(pattern, text) is not None
        goes_on = [regex.fullmatch(pattern, text + spelled([i]), partial=True) is not None for i in range(len(logits))]
        return tuple(x if (is_done if i == end else goes_on[i]) else -math.inf for i, x in enumerate(logits))

    return change


def predicted(tokens: list[int], request: Request) -> int | None:
    """What a prediction says comes next, read anew from its beginning."""
    ids, place, is_lost = request.prediction_ids, 0, False
    text = tuple(tokens[len(request.prompt_ids) :])
    for end in range(1, len(text) + 1):
        if not is_lost and ids[place : place + 1] == text[end - 1 : end]:
            place += 1
            continue
        is_lost = True
        for n, reach in ((3, 10**9), (2, 10**9), (1, 16)):
            same = [i for i in range(n, len(ids)) if n <= end and ids[i - n : i] == text[end - n : end]]
            behind = [i for i in same if place <= i <= place + reach]
            if behind or (same and n > 1):
                place, is_lost = (min(behind) if behind else max(same)), False
                break
    return ids[place] if not is_lost and place < len(ids) else None


def answer(
    request: Request,
    target: NaiveModel,
    drafter: NaiveModel | None = None,
    choice: int = 0,
    mask: Change = unchanged,
    penalty: Change = unchanged,
) -> tuple[int, ...]:
    """What choice `choice` of a request must be: every position drafted, accepted or recovered by itself.

    `mask` changes what rules and draws see, `penalty` what draws see; both come on top of what the request asks for.
    """
    sampling, speculation = request.sampling, request.speculation

    def seen(model: NaiveModel) -> tuple[Row, Row]:
        """Logits as rules see them, and as draws do."""
        logits = mask(tokens, masked(tokens, model.logits(tokens), request))
        return logits, penalty(tokens, penalised(tokens, logits, request))

    tokens = list(request.prompt_ids)
    for position in range(len(tokens), len(tokens) + sampling.max_tokens):
        u = [uniform(sampling.seed, choice, position, purpose) for purpose in (DRAFT, ACCEPT, RECOVER)]
        p_logits, p_penalised = seen(target)
        p = processed(p_penalised, sampling)
        is_certain = request.grammar is not None and sum(x > 0 for x in softmax(p_logits)) == 1
        if drafter is None or not speculation.enabled or position > drafter.context or is_certain or predicted(tokens, request) is not None:
            token = draw(p, u[2])
        else:
            q_logits, q_penalised = seen(drafter)
            q = processed(q_penalised, sampling)
            pi = pi_of(speculation.rule, speculation.alpha, Pair(softmax(q_logits), softmax(p_logits), q, p, sampling.is_greedy))
            token = draw(q, u[0])
            if u[1] * q[token] >= pi[token]:
                token = draw([max(0.0, b - a) for a, b in zip(q, pi, strict=True)], u[2])
        tokens.append(token)
        if token in sampling.stop_token_ids:
            break
    return tuple(tokens[len(request.prompt_ids) :])


def model_alone(request: Request, model: NaiveModel, purpose: int, choice: int = 0) -> tuple[int, ...]:
    """Plain sampling from one model, with the numbers of one purpose."""
    tokens = list(request.prompt_ids)
    for position in range(len(tokens), len(tokens) + request.sampling.max_tokens):
        row = processed(penalised(tokens, masked(tokens, model.logits(tokens), request), request), request.sampling)
        tokens.append(draw(row, uniform(request.sampling.seed, choice, position, purpose)))
        if tokens[-1] in request.sampling.stop_token_ids:
            break
    return tuple(tokens[len(request.prompt_ids) :])
