"""Fields of a request that change nothing here: refused where they ought to change the answer, named where they ought not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from engine.errors import InvalidRequest
from server.deps import Serving
from server.openai.schema import ChatBody, GenerationBody
from server.openai.values import Body

_log = logging.getLogger(__name__)
_MAX_LOGGED, _LONGEST_NAME = 256, 64  # names of fields, and characters of one

# Fields that OpenAI, vLLM or llama.cpp know and that would change the answer, and values that ask for nothing. null always does. Some are
# known to one endpoint and not to the other.
NOT_IMPLEMENTED: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "dry_multiplier": (0,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mirostat": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "n_predict": (),
    "prompt_logprobs": (),
    "repeat_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "web_search_options": (),
    # in a message
    "messages.audio": (),
    "messages.function_call": (),
}

_INSTEAD = {  # deprecated by OpenAI
    "functions": "It was replaced by tools.",
    "function_call": "It was replaced by tool_choice.",
    "messages.function_call": "It was replaced by messages.tool_calls.",
}


def ignored_in(body: GenerationBody, serving: Serving) -> tuple[str, ...]:
    """Names of the fields that will change nothing; each is logged once.

    Raises InvalidRequest for one that ought to change something and cannot yet, and for all where the deployment refuses them.
    """
    names: dict[str, None] = {}  # a set that keeps the order; names are short, since clients make them up
    for prefix, part in _parts(body):
        names |= dict.fromkeys(_unused(part, prefix))
    if isinstance(body, ChatBody) and body.prediction is not None and serving.info.drafter == "none":
        names["prediction"] = None  # nothing is drafted here
    if isinstance(body, ChatBody) and body.reasoning_effort is not None and not _minds_effort(body.reasoning_effort, serving):
        names["reasoning_effort"] = None
    if names and serving.deployment.server.unused_fields == "refuse":
        name = next(iter(names))
        raise InvalidRequest(f"{name} changes nothing on this server, which refuses such fields (server.unused_fields).", name)
    for name in names.keys() - serving.unused_fields:
        if len(serving.unused_fields) < _MAX_LOGGED:
            serving.unused_fields.add(name)
            _log.info(
                "The field %s of requests changes nothing here; x-cascade-ignored names it, and this log does not again",
                quote(name, errors="replace"),
            )
    return tuple(names)


def _minds_effort(effort: str, serving: Serving) -> bool:
    """Whether the model's template asks how much it is to think, or, where that is not at all, whether."""
    source = serving.tokenizer.template_source or ""
    return "reasoning_effort" in source or (effort == "none" and "enable_thinking" in source)


def _parts(body: Body, prefix: str = "") -> Iterator[tuple[str, Body]]:
    """All objects of a request, with what their fields are called by: that of a list is its own, whichever entry it is."""
    yield prefix, body
    for name in type(body).model_fields:
        value = getattr(body, name)
        found = value if isinstance(value, list) and value and isinstance(value[0], Body) else (value,)
        for part in found:
            if isinstance(part, Body):
                yield from _parts(part, f"{prefix}{name}.")


def _unused(part: Body, prefix: str) -> Iterator[str]:
    for key, value in (part.model_extra or {}).items():
        name = prefix + key
        if value is None:
            continue
        if name not in NOT_IMPLEMENTED:
            yield name[:_LONGEST_NAME]
        elif not any(_is_same(value, neutral) for neutral in NOT_IMPLEMENTED[name]):
            raise InvalidRequest(f"{name} is not implemented by this endpoint. {_INSTEAD.get(name, 'Leave it out.')}", name)


def _is_same(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
