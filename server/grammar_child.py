"""Makes grammars of what clients wish for, and says whether answers can be held to them: in a process of its own, since clients write them.

`python -m server.grammar_child FOLDER SECONDS END...`, started by server/grammar_checker.py alone. A line of JSON in, a line out. What
takes more seconds of a processor ends the process: a conversion of thousands of rules is slower than linear, and the library that parses
can be sent round for ever. Ends with its standard input, or with whoever started it.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

from llguidance import LLMatcher, grammar_from

from engine.grammar.automaton import LONGEST, NotCompiled, Vocabulary
from engine.programs import die_with_starter
from server.structure import NO_STRINGS, json_of, with_start

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_TERMINAL = re.compile(r"^\s*([A-Z_][A-Z0-9_]*)\s*(?:\[[^\]]*\])?\s*:", re.MULTILINE)


def main(folder: str, seconds: str, *end_token_ids: str) -> NoReturn:
    """Answer until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the server decides what becomes of us
    die_with_starter()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        vocabulary = Vocabulary.from_folder(Path(folder), tuple(map(int, end_token_ids)))
        _say({}, answers)
        for line in sys.stdin.buffer:
            _allow(int(seconds))
            _say(answer_to(json.loads(line), vocabulary), answers)
    sys.exit(0)


def _allow(seconds: int) -> None:
    """So much more time of a processor; then the system ends this process."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    until = math.ceil(time.process_time()) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (until if most == resource.RLIM_INFINITY else min(until, most), most))


def answer_to(question: Mapping[str, Any], vocabulary: Vocabulary | None) -> Mapping[str, str]:
    """A grammar, or what is wrong with the wish."""
    if vocabulary is None:
        return {"mistake": "this model's tokens cannot be read"}
    try:
        grammar = _MAKERS[question["kind"]](question["value"], question["white_space"])
        is_clients = question["kind"] == "grammar" and len(grammar) <= LONGEST
        mistake = _mistake(grammar, vocabulary) if is_clients else vocabulary.mistake_in(grammar)
    except (ValueError, RecursionError, NotCompiled) as error:
        return {"mistake": str(error) or type(error).__name__}
    return {"mistake": mistake} if mistake else {"grammar": grammar}


def _say(answer: Mapping[str, str], answers: TextIO) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


# ---------------------------------------------------------------------- making
def _json(schema: Any, white_space: str | None) -> str:
    if isinstance(schema, bool):
        if not schema:
            raise ValueError("the schema false allows nothing")
        schema = {}
    return f"start: {json_of(_ANY_OBJECT if schema is None else schema, white_space=white_space)}\n"


def _regex(expression: str, white_space: str | None) -> str:
    if (len(expression) - len(expression.rstrip("\\"))) % 2:
        raise ValueError("the expression ends with a backslash that escapes nothing")
    escaped: str = json.loads(LLMatcher.grammar_from_regex(expression))["grammars"][0]["lark_grammar"]
    return escaped


def _choice(texts: Any, white_space: str | None) -> str:
    return grammar_from("choice", json.dumps(texts))


def _grammar(text: str, white_space: str | None) -> str:
    return grammar_from("grammar", text)


def _made(text: str, white_space: str | None) -> str:
    return text


_MAKERS: Mapping[str, Callable[[Any, str | None], str]] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,  # a client's own
    "made": _made,  # of ours
}


# ---------------------------------------------------------------------- checking
def _mistake(grammar: str, vocabulary: Vocabulary) -> str:
    """As the vocabulary's, and it is a mistake, too, if a terminal matches nothing: behind another one, the library (1.9.1) would look for
    what it could be for ever, here or in the middle of an answer."""
    for name, alone in _terminals(grammar):
        matcher = vocabulary.matcher(alone)
        if not matcher.is_error():
            matcher.compute_bitmask()
            if matcher.is_error() and not matcher.is_accepting():
                return f"{name} matches nothing"
    return vocabulary.mistake_in(grammar)


def _terminals(grammar: str) -> Iterator[tuple[str, str]]:
    """Expressions and named terminals, each as a grammar of its own. Names are asked about only where there is an operator that can leave
    nothing of two expressions that match something."""
    for expression in dict.fromkeys(match[0] for match in NO_STRINGS.finditer(grammar) if match[0].startswith("/") and match[0][1] != "/"):
        yield expression, f"start: {expression}\n"
    plain = NO_STRINGS.sub("", grammar)
    if "&" in plain or "~" in plain:
        for name in dict.fromkeys(_TERMINAL.findall(plain)):
            yield name, f"{with_start(grammar, 'whole_of_it')}\nstart: {name}\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
