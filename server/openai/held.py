"""What a chat's answer is held to: the structure that was asked for, calls of its tools, and thinking in front of either."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.errors import InvalidRequest
from server.deps import Serving
from server.openai.conversation import Conversation
from server.reading import Reading
from server.reasoning import Phase
from server.structure import Structure, grammar_of_structure, with_start
from server.tools.formats import ToolFormat, ToolUse
from server.tools.grammar import behind_thinking, tool_grammar


@dataclass(frozen=True)
class Held:
    """What answers are held to, and who asked for that."""

    grammar: str  # the engine's
    params: tuple[str, ...]  # fields of the request


async def held_of(structure: Structure | None, conversation: Conversation, reading: Reading | None, serving: Serving) -> Held | None:
    """None where any text will do. Raises InvalidRequest for what cannot be held to, naming the field."""
    shape = await held_to_structure(structure, serving)
    calls = await _calls(structure, conversation, reading, serving)
    may_write = conversation.use is None or conversation.use.mode == "auto"
    held = await _sound(_either(calls, shape), serving) if calls and shape and may_write else calls or shape
    if held is None or reading is None or reading.reasoning is None or reading.phase not in (Phase.BEFORE, Phase.THINKING):
        return held
    ids = serving.tokenizer.added_ids((reading.reasoning.opening, reading.reasoning.closing))
    return await _sound(
        replace(held, grammar=behind_thinking(held.grammar, reading.reasoning, reading.phase is Phase.THINKING, ids)), serving
    )


async def held_to_structure(structure: Structure | None, serving: Serving) -> Held | None:
    """As `held_of`, where answers neither call nor think."""
    if structure is None:
        return None
    return Held(await grammar_of_structure(structure, serving.grammars), (structure.param,))


async def _calls(structure: Structure | None, conversation: Conversation, reading: Reading | None, serving: Serving) -> Held | None:
    """Calls: of answers that call, where there is a structure that others have."""
    use = conversation.use
    if use is None or reading is None or reading.tools is None:
        return None
    if structure is not None:
        if structure.kind == "grammar":
            raise InvalidRequest("A grammar of one's own cannot go with tools, whose calls have another.", structure.param)
        if use.mode == "auto":
            use = replace(use, mode="required")
    grammar = _grammar_of_calls(reading.tools, use, serving)
    if grammar is None:
        return None
    if mistake := await serving.grammars.mistake_in(grammar):
        raise InvalidRequest(f"Calls cannot be held to these tools: {mistake[:500]}", "tools")
    return Held(grammar, ("tools",))


async def _sound(held: Held, serving: Serving) -> Held:
    """What is put together of sound parts may still be too much, or have two rules of one name."""
    if mistake := await serving.grammars.mistake_in(held.grammar):
        raise InvalidRequest(f"Answers cannot be held to this together with the model's thinking or tools: {mistake[:500]}", held.params[0])
    return held


def _grammar_of_calls(form: ToolFormat, use: ToolUse, serving: Serving) -> str | None:
    return tool_grammar(form, use, serving.tokenizer.added_ids(form.marks))


def _either(calls: Held, shape: Held) -> Held:
    """Answers that call, or that have the shape."""
    rules = f"{with_start(calls.grammar, 'calls_of_tools')}\n{with_start(shape.grammar, 'shape_of_text')}"
    return Held(f"start: calls_of_tools | shape_of_text\n{rules}", (*shape.params, *calls.params))
