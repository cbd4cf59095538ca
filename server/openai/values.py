"""What all parts of requests share: texts that can be tokenised, JSON that can be walked over, objects that keep unknown keys."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

MAX_CHARACTERS = 4 << 20  # of one text: more than fit any context that is served


def encodable(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"must have at most {MAX_CHARACTERS} characters.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half of a surrogate pair, which no tokenizer can read") from error
    return text


def walkable(value: Any, levels: int = 16) -> Any:
    """JSON as it is; a text that no tokenizer can read, and what is nested too deeply to walk over, is a mistake."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, float) and not isfinite(value):
        raise ValueError("it holds a number that is none in JSON")
    if isinstance(value, dict | list) and not levels:
        raise ValueError("it is nested too deeply")
    for part in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        walkable(part, levels - 1)
    return value


Text = Annotated[str, AfterValidator(encodable)]


class Body(BaseModel):
    """Something that a client sent: no type is bent to fit, unknown keys are kept."""

    model_config = ConfigDict(strict=True, extra="allow")
