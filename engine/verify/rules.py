"""The rules: which drafted tokens may stand. Each is a keep-set A per row; pi = q on A + eta * p follows from it in the Verifier.

Rules compare probabilities at temperature 1 without truncation (raw.q, raw.p), so that what a rule thinks of a token does not change with
how it is sampled. Ratios, residuals, eta and total variation are those of the rows that are sampled from: appendix C.1 of the source and
its authors' code. A tie keeps the drafter. What alpha may be, and where a rule becomes target or drafter, stands in engine/dials.py.

Source, unless a rule names another: Narasimhan, Jitkrittum, Rawat, Kim, Gupta, Menon and Kumar, "Faster Cascades via Speculative
Decoding" (2025), https://arxiv.org/abs/2405.19261. q is the drafter's row, p the target's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.plan import RawRows, Rule


class _Cascade:
    """What most rules are."""

    needs_q = True
    is_lossless = False
    is_lenient = False


class Exact(_Cascade):
    """A is empty, so pi = p: the text has the target's own law. No dial, reads nothing.

    Source: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding" (2023), algorithm 1.
    """

    needs_q = False
    is_lossless = True

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        return torch.zeros_like(alpha, dtype=torch.bool)


class Lossy(_Cascade):
    """Lenience: a draft stands with probability min(1, p / ((1 - alpha) q)); the residual is max(0, p - q) (beta = 1).

    pi = min(q, p / (1 - alpha)) + R * norm(max(0, p - q)), R being what the first term leaves to 1. alpha in [0, 1]: 0 is the target, 1 the
    drafter. Needs q. On a greedy row, whose q and p are one-hot, a ratio is 0 or 1 at any lenience; there a draft stands if the target
    finds it at least 1 - alpha times as likely as its favourite; none at 0, where penalties may have made another token the most likely.

    Source: Leviathan et al. (2023), appendix A.5; Tran-Thien, "An Optimal Lossy Variant of Speculative Decoding" (2023); beta as in the
    code of Narasimhan et al.
    """

    is_lenient = True

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        return raw.is_greedy & (alpha > 0) & (raw.p >= (1 - alpha) * raw.p.amax(-1, keepdim=True))


class Chow(_Cascade):
    """All, where the drafter is sure: max q >= 1 - alpha (equation 2). alpha in [-1, 1]: below 0 the target, 1 the drafter. Needs q."""

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        return raw.q.amax(-1, keepdim=True) >= 1 - alpha


class Diff(_Cascade):
    """All, where the drafter is about as sure as the target: max q >= max p - alpha (equation 5). alpha in [-1, 1]: -1 is the target, 1 the
    drafter; at 0 the surer of the two writes, which is not exact. Needs q."""

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        return raw.q.amax(-1, keepdim=True) >= raw.p.amax(-1, keepdim=True) - alpha


class Opt(_Cascade):
    """All, where max q >= max p - alpha * TV(p, q) (equation 10): deferring costs a rejection where the two disagree, so there it keeps
    MORE. Any alpha: -inf is the target, inf the drafter, 0 is diff at 0. Needs q."""

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        return raw.q.amax(-1, keepdim=True) >= raw.p.amax(-1, keepdim=True) - alpha * raw.total_variation


class TokenV1(_Cascade):
    """Tokens that the drafter finds likely: q(v) >= max p - alpha (equation 13). alpha in [-1, 1]: -1 is the target, 1 the drafter.
    Needs q."""

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        return raw.q >= raw.p.amax(-1, keepdim=True) - alpha


class TokenV2(_Cascade):
    """Tokens that the target finds likely: p(v) >= max p - alpha (equation 14). alpha in [-1, 1]: below 0 the target, 1 the drafter; at 0
    the target's favourite always stands, which is not exact when sampling. Needs no q."""

    needs_q = False

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        return raw.p >= raw.p.amax(-1, keepdim=True) - alpha


class TokenV3(_Cascade):
    """Tokens that the target finds nearly as likely as its favourite: p(v) >= (1 - alpha) max p (equation 15). alpha in [-1, 1]: below 0
    the target, 1 the drafter; at 0 the favourite always stands, which is not exact when sampling. Needs no q."""

    needs_q = False

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        return raw.p >= (1 - alpha) * raw.p.amax(-1, keepdim=True)


class ChowLog(_Cascade):
    """All, where the drafter's entropy in nats is at most alpha (log loss in place of equation 2, appendix D). alpha in [-1, inf]: below 0
    the target, log(vocabulary) the drafter. Needs q."""

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        return _entropy(raw.q) <= alpha


class DiffLog(_Cascade):
    """All, where the drafter's entropy is at most the target's + alpha, in nats (log loss in place of equation 5, appendix D). Any alpha:
    -inf is the target, inf the drafter. Needs q."""

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        return _entropy(raw.q) <= _entropy(raw.p) + alpha


class Bild(_Cascade):
    """All, where the two agree: TV(q, p) <= alpha, of the rows that are sampled from. alpha in [-1, 1]: below 0 the target, 1 the drafter.
    Needs q.

    Source: Kim, Mangalam, Moon, Malik, Mahoney, Gholami and Keutzer, "Speculative Decoding with Big Little Decoder" (2023), as the rule
    BiLD* of Narasimhan et al.; the discrepancy is ours.
    """

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        return raw.total_variation <= alpha


def _entropy(rows: Tensor) -> Tensor:
    """[N, V] to nats [N, 1]."""
    entropy: Tensor = torch.special.entr(rows).sum(-1, keepdim=True)
    return entropy


RULES: dict[str, Rule] = {
    "exact": Exact(),
    "lossy": Lossy(),
    "chow": Chow(),
    "diff": Diff(),
    "opt": Opt(),
    "token_v1": TokenV1(),
    "token_v2": TokenV2(),
    "token_v3": TokenV3(),
    "chow_log": ChowLog(),
    "diff_log": DiffLog(),
    "bild": Bild(),
}
