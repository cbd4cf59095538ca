"""Which tokens may come next, by the grammar of an answer. The engine's only file that knows llguidance, which does the parsing.

A grammar is a text in llguidance's own form; the server makes it out of JSON schemas, expressions and the like, and checks it
(server/grammar_child.py). Knows token ids and bits, no tensors, and nothing of what a client asked.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary, WeakSet

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.sequence import Sequence

Mask = bytes  # a bit a token, the lowest first: what may come next
_log = logging.getLogger(__name__)
_STACK_SIZE_LOCK = threading.Lock()  # the size is the whole process's

LONGEST = 128 << 10  # characters of a grammar: what takes the parser longer than a tenth of a second is longer, or fails at its first token
_STACK = 256 << 20  # bytes: the parser follows references by recursion, and a grammar of that length can have 14,000 in a row
_MOST_DEAD = 4  # drafts of an answer that may lead nowhere
_NUM_COMPILED = 32  # grammars that are kept for the next request that has them
# A tenth of a second for a step and some 20 MB for a grammar, where the library's own would be seconds, and five times as much.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class Vocabulary:
    """The tokens of a model as a grammar sees them: bytes, and ends."""

    def __init__(self, tokenizer: LLTokenizer, end_token_ids: tuple[int, ...]):
        """`tokenizer` has these end tokens."""
        self.tokenizer = tokenizer
        self.end_token_ids = end_token_ids

    @classmethod
    def from_folder(cls, folder: Path, end_token_ids: tuple[int, ...]) -> Vocabulary | None:
        """Of the tokenizer.json in a model's folder; None without one, or without an end, or where the library cannot read it."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            return _read(path.read_text("utf-8"), end_token_ids)
        except ValueError as error:
            _log.warning("Answers of this model cannot be held to a grammar: %s", str(error).partition("\n")[0])
            return None

    def matcher(self, grammar: str) -> LLMatcher:
        """At the beginning of a text. What is wrong with the grammar is an error of the matcher. Raises NotCompiled."""
        return self.compiling(grammar).result()

    def compiling(self, grammar: str) -> _Compiling:
        """The same, begun: most take a few milliseconds, the longest a fifth of a second, in which other threads go on."""
        return _Compiling(lambda: LLMatcher(self.tokenizer, grammar, log_level=0, limits=_LIMITS))

    def mistake_in(self, grammar: str) -> str:
        """Why answers cannot be held to a grammar, in the library's words; "" where they can.

        Looks as far as the first token, and whether it can be taken back. Takes a millisecond, at worst a second; other threads go on.
        """
        if len(grammar) > LONGEST:
            return f"it has {len(grammar)} characters, and may have {LONGEST}"
        matcher = self.matcher(grammar)
        if not matcher.is_error():
            token = next(_set_bits(matcher.compute_bitmask()), None)
            if token is not None and matcher.try_consume_tokens([token]):
                matcher.rollback(1)
        return matcher.get_error().partition("\n<")[0]


def _read(text: str, end_token_ids: tuple[int, ...]) -> Vocabulary | None:
    """Once, which takes a third of a second, unless an end is named that is not there, as some configs do. Raises ValueError."""
    try:
        tokenizer = LLTokenizer(text, eos_token=list(end_token_ids) or None)
    except ValueError:
        known = tuple(token for token in end_token_ids if token < LLTokenizer(text).vocab_size)
        if known == end_token_ids:  # it was something else
            raise
        return _read(text, known)
    return Vocabulary(tokenizer, end_token_ids) if end_token_ids else None


class NotCompiled(Exception):
    """Why a grammar could not be compiled that may be right: no memory for it, or a mistake of the library."""


class _Compiling:
    """Work that is done in a thread with room for recursion: one that runs out of it ends the process."""

    def __init__(self, work: Callable[[], LLMatcher]):
        self._work = work
        self._outcome: LLMatcher | BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="grammar", daemon=True)
        with _STACK_SIZE_LOCK:
            before = threading.stack_size(_STACK)
            try:
                self._thread.start()
            except (RuntimeError, MemoryError) as error:  # no room for its stack
                self._outcome = error
            finally:
                threading.stack_size(before)

    def _run(self) -> None:
        try:
            self._outcome = self._work()
        except BaseException as error:  # noqa: BLE001  # a panic of the library is no Exception; whoever asks for the result gets it
            self._outcome = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> LLMatcher:
        """Waits for it. Raises NotCompiled."""
        if self._thread.is_alive():
            self._thread.join()
        if isinstance(self._outcome, BaseException):
            raise NotCompiled(f"{type(self._outcome).__name__}: {self._outcome}") from self._outcome
        assert self._outcome is not None
        return self._outcome


@dataclass(slots=True)
class _Run:
    """Where a sequence stands in its grammar: behind `num_settled` tokens of its answer and those of `path`."""

    matcher: LLMatcher
    num_settled: int = 0  # tokens of the answer that never come back
    path: list[int] = field(default_factory=list)  # then these: committed ones, and drafts that may still be rejected
    masks: dict[int, Mask] = field(default_factory=dict)  # by the number of tokens in front
    is_broken: bool = False
    dead: tuple[int, list[int]] | None = None  # tokens of the answer, and the drafts behind them that nothing can follow
    num_dead: int = 0  # such places, so far


class Automata:
    """The place of every sequence in its grammar. A place follows from tokens and drafts alone, so nobody reports what became of drafts:
    the next question tells."""

    def __init__(self, vocabulary: Vocabulary | None, vocab_size: int):
        """Without a vocabulary no request may have a grammar; Admission sees to that. `vocab_size`: tokens that can be drawn."""
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._runs: WeakKeyDictionary[Sequence, _Run] = WeakKeyDictionary()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # the newest last
        self._compiling: tuple[Sequence, _Compiling] | None = None  # one at a time, or nothing would be left for the steps
        self._lost: WeakSet[Sequence] = WeakSet()  # whose grammar could not be compiled

    @property
    def preparing(self) -> Sequence | None:
        """The one that asked for what is being compiled now."""
        return None if self._compiling is None else self._compiling[0]

    def is_ready(self, seq: Sequence) -> bool:
        """Whether a sequence can be asked about without delay. A grammar that is not known is compiled from now on, beside the steps: who
        wants it waits, and nobody else does."""
        grammar = seq.request.grammar
        if grammar is None or seq in self._runs or seq in self._lost:
            return True
        if self._compiling is not None and self._compiling[1].is_done:
            first, compiling = self._compiling
            self._compiling = None
            self._finish(first, compiling)
        if seq in self._lost:
            return True
        if grammar in self._compiled:
            self._runs[seq] = _Run(self._copy(grammar))
            return True
        if self._compiling is None:
            assert self._vocabulary is not None
            self._compiling = seq, self._vocabulary.compiling(grammar)
        return False

    def _finish(self, first: Sequence, compiling: _Compiling) -> None:
        """Keep what was compiled for a sequence. Where it could not be, that one is lost, and whoever else wants it tries anew."""
        assert first.request.grammar is not None
        try:
            self._keep(first.request.grammar, compiling.result())
        except NotCompiled as error:
            self._lose(first, error)

    def _lose(self, seq: Sequence, error: NotCompiled) -> None:
        _log.error("The grammar of request %s could not be compiled, and its answer ends: %s", seq.request.id, error)
        self._lost.add(seq)

    def mask(self, seq: Sequence, drafts: ListLike[int]) -> Mask | None:
        """What may follow the sequence and these drafts; None where there is no grammar, or no telling: a draft cannot stand, or nothing
        can follow it, and then what is drawn there is cut off."""
        is_renewed = False
        while (run := self._at(seq, drafts)) is not None:
            place = run.num_settled + len(run.path)
            if place in run.masks:
                return run.masks[place]
            mask = self._read(run.matcher, seq)
            if not run.matcher.is_error() and next(_set_bits(mask), self._vocab_size) < self._vocab_size:
                run.masks[place] = mask
                return mask
            if is_renewed:
                self._end_behind(run, seq, drafts)
            else:
                is_renewed = self._renew(run, seq)
        return None

    def next(self, seq: Sequence, drafts: ListLike[int]) -> int | None:
        """The one token that may follow, if it is only one."""
        run = self._at(seq, drafts)
        if run is None or run.matcher.is_accepting():
            return None
        forced = run.matcher.compute_ff_tokens()
        return forced[0] if forced and forced[0] < self._vocab_size else None

    def is_broken(self, seq: Sequence) -> bool:
        """Whether the grammar of a sequence got too complex to follow, or could not be compiled. Its answer cannot go on."""
        run = self._runs.get(seq)
        return seq in self._lost or (run is not None and run.is_broken)

    def may_draft(self, seq: Sequence) -> bool:
        """Each draft that leads nowhere costs a parser that is made anew within the step: a few may, and then it is enough."""
        run = self._runs.get(seq)
        return run is None or run.num_dead < _MOST_DEAD

    def num_standing(self, seq: Sequence, token_ids: ListLike[int]) -> int:
        """How many of a round's tokens are those of the grammar. Behind a draft that nothing can follow, no token is."""
        run = self._runs.get(seq)
        return len(run.dead[1]) if run and run.dead and _is_dead(run, seq, token_ids) else len(token_ids)

    def _at(self, seq: Sequence, drafts: ListLike[int]) -> _Run | None:
        """The run of a sequence, moved behind these drafts; None where it cannot be."""
        if seq.request.grammar is None or seq in self._lost:
            return None
        run = self._runs.get(seq)
        if run is None:
            try:
                run = self._runs[seq] = _Run(self._copy(seq.request.grammar))
            except NotCompiled as error:
                self._lose(seq, error)
                return None
        if run.is_broken or _is_dead(run, seq, drafts):
            return None
        is_there = _moved(run, seq, drafts)
        if run.matcher.is_error() or _is_behind(run, seq):  # not even what was emitted can be read
            if not self._renew(run, seq):
                return None
            is_there = _moved(run, seq, drafts)
            if run.matcher.is_error():
                self._end_behind(run, seq, drafts)
                return None
        _settle(run, seq)
        return run if is_there else None

    def _end_behind(self, run: _Run, seq: Sequence, drafts: ListLike[int]) -> None:
        """Nothing can follow, not even for a parser that begins anew. Behind drafts that is no matter before they stand: without them the
        answer might have gone elsewhere."""
        if not drafts:
            run.is_broken = True
            return
        run.dead, run.num_dead = (_num_answered(seq), list(drafts)), run.num_dead + 1
        if run.matcher.is_error():  # what is in front of it will be asked about again
            self._restart(run, seq)

    def _renew(self, run: _Run, seq: Sequence) -> bool:
        """Begin anew with the parser, which others may have worn out: copies share states, and these are limited. False if that does not
        help: the run is broken then. Here alone a step waits for a grammar to be compiled: of an answer that has begun."""
        assert seq.request.grammar is not None
        self._compiled.pop(seq.request.grammar, None)
        return self._restart(run, seq)

    def _restart(self, run: _Run, seq: Sequence) -> bool:
        """Read the answer again with a copy of the parser that there is. False if it cannot be read: the run is broken then."""
        assert seq.request.grammar is not None
        answer = seq.tokens[len(seq.request.prompt_ids) :]
        try:
            run.matcher = self._copy(seq.request.grammar)
        except NotCompiled as error:
            self._lose(seq, error)
            return False
        run.num_settled, run.path, run.masks = len(answer), [], {}
        run.is_broken = run.matcher.try_consume_tokens(answer) < len(answer) or run.matcher.is_error()
        return not run.is_broken

    def _copy(self, grammar: str) -> LLMatcher:
        assert self._vocabulary is not None
        if grammar not in self._compiled:
            self._keep(grammar, self._vocabulary.matcher(grammar))
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar].deep_copy()

    def _keep(self, grammar: str, matcher: LLMatcher) -> None:
        self._compiled[grammar] = matcher
        if len(self._compiled) > _NUM_COMPILED:
            self._compiled.popitem(last=False)

    def _read(self, matcher: LLMatcher, seq: Sequence) -> Mask:
        """The mask at a place. Where an end may come, whatever ends this request's answers may."""
        assert self._vocabulary is not None
        mask = matcher.compute_bitmask()
        if not any(_has(mask, token) for token in self._vocabulary.end_token_ids):
            return mask
        bits = bytearray(mask)
        for token in seq.request.sampling.stop_token_ids:
            if token < 8 * len(bits):
                bits[token // 8] |= 1 << token % 8
        return bytes(bits)


def _has(mask: Mask, token: int) -> bool:
    return bool(mask[token // 8] >> token % 8 & 1)


def _set_bits(mask: Mask) -> Iterator[int]:
    """The tokens of a mask, from the lowest."""
    return (8 * i + bit for i, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1)


def _num_answered(seq: Sequence) -> int:
    return len(seq.tokens) - len(seq.request.prompt_ids)


def _is_behind(run: _Run, seq: Sequence) -> bool:
    """Whether something that was emitted has not been read."""
    return run.num_settled + len(run.path) < _num_answered(seq)


def _is_dead(run: _Run, seq: Sequence, drafts: ListLike[int]) -> bool:
    """Whether nothing can follow these drafts, or some of them."""
    return run.dead is not None and run.dead[0] == _num_answered(seq) and list(drafts[: len(run.dead[1])]) == run.dead[1]


def _moved(run: _Run, seq: Sequence, drafts: ListLike[int]) -> bool:
    """Go back to where the path leaves text and drafts, and on to their end. False where a token cannot be read, or ends the answer."""
    goal = [*seq.tokens[len(seq.request.prompt_ids) + run.num_settled :], *drafts]
    num_same = next((i for i, (a, b) in enumerate(zip(run.path, goal, strict=False)) if a != b), min(len(run.path), len(goal)))
    if excess := len(run.path) - num_same:
        run.matcher.rollback(excess)
        del run.path[num_same:]
        run.masks = {place: mask for place, mask in run.masks.items() if place <= run.num_settled + num_same}
    for token in goal[num_same:]:
        if token in seq.request.sampling.stop_token_ids or not run.matcher.try_consume_tokens([token]):
            return False
        run.path.append(token)
    return True


def _settle(run: _Run, seq: Sequence) -> None:
    """Forget how emitted tokens were reached."""
    num_new = min(_num_answered(seq) - run.num_settled, len(run.path))
    if num_new > 0:
        del run.path[:num_new]
        run.num_settled += num_new
        run.masks = {place: mask for place, mask in run.masks.items() if place >= run.num_settled}
