"""Deployment files: YAML in, one frozen Deployment out, or one line for everything that is wrong. Other files are read by the same means.

A message names the key, the value and the bound. Unknown and repeated keys are refused. CASCADE_ variables override the server's part and
nothing else, so that a file says what is computed. Nothing is looked up here: whether a model exists is the engine's business.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, ByteSize, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from engine.config import EngineConfig, Preset, Section
from engine.errors import ConfigError
from engine.logs import LogFormat
from server import reasoning
from server.fit import fit_key, fit_origin, fit_proxy, fit_root_path
from server.tools import formats as tools

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Section)

ENV_PREFIX = "CASCADE_"
OTHER_VARIABLES = frozenset({"CASCADE_CACHE_DIR"})  # read by the engine's loader
LISTS = frozenset({"api_keys", "cors_origins", "trusted_proxies"})  # in variables their values are separated by commas
ApiKey = Annotated[str, Field(min_length=1), AfterValidator(fit_key)]


class ServerSettings(Section):
    """The HTTP side. Every key can be overridden by CASCADE_ and its name in capitals; an empty variable overrides nothing."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_keys: tuple[ApiKey, ...] = Field((), description="accepted bearer tokens or their digests; none: everybody is served")
    api_keys_file: Path | None = Field(None, description="file of further ones, one a line")
    cors_origins: tuple[Annotated[str, AfterValidator(fit_origin)], ...] = Field(
        (), description="origins whose pages browsers let in, such as https://example.org; '*' is any"
    )
    max_queued_requests: int = Field(256, ge=1, le=1_000_000, description="answers that may wait before new ones get a 503")
    max_requests_per_key: int | None = Field(
        None, ge=1, le=1_000_000, description="open requests of one API key; beyond it is a 429; none: no bound"
    )
    max_body_bytes: ByteSize = Field(ByteSize(32 << 20), ge=1, description="longest body of a request, such as 32MiB; beyond it is a 413")
    body_timeout_seconds: float = Field(
        60.0, gt=0, le=86_400, allow_inf_nan=False, description="longest that sending the head of a request may take, and then its body"
    )
    send_timeout_seconds: float = Field(
        60.0, ge=1, le=86_400, allow_inf_nan=False, description="a client that takes nothing of its answer for so long is left (on Linux)"
    )
    request_timeout_seconds: float | None = Field(
        None,
        gt=0,
        le=604_800,
        allow_inf_nan=False,
        description="longest that answering may take, from arrival on; none: as long as it takes",
    )
    drain_seconds: float = Field(30.0, ge=0, le=86_400, allow_inf_nan=False, description="time to finish what runs at SIGTERM")
    keep_alive_seconds: float = Field(15.0, gt=0, le=3600, allow_inf_nan=False, description="a silent stream gets a comment this often")
    engine_hang_seconds: float = Field(30.0, ge=5, le=86_400, allow_inf_nan=False, description="an engine silent for so long is killed")
    unused_fields: Literal["report", "refuse"] = Field("report", description="of requests: named in a header, or a 400")
    tool_format: tools.FormatName = Field("auto", description="how the model writes calls of functions; auto: as its chat template says")
    reasoning_format: reasoning.FormatName = Field("auto", description="how the model marks thinking; auto: as its chat template says")
    page: bool = Field(True, description="serve the page at /")
    root_path: Annotated[str, AfterValidator(fit_root_path)] = Field("", description="path under which a proxy shows this server")
    trusted_proxies: tuple[Annotated[str, AfterValidator(fit_proxy)], ...] = Field(
        (), description="addresses whose X-Forwarded-For and -Proto are believed; none: nobody's"
    )
    tls_certificate: Path | None = Field(None, description="PEM file with the certificate and those above it; none: plain HTTP")
    tls_key: Path | None = Field(None, description="PEM file with its key")
    objective_first_token_seconds: float = Field(2.0, gt=0, le=3600, allow_inf_nan=False, description="promised time to the first token")
    objective_per_token_seconds: float = Field(
        0.1, gt=0, le=3600, allow_inf_nan=False, description="promised: mean of an answer's further tokens"
    )
    vllm_metric_names: bool = Field(False, description="/metrics counts drafts under vLLM's names as well")
    otlp_endpoint: str | None = Field(None, min_length=1, description="collector that traces go to, over OTLP/HTTP; none: no traces")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = Field("console", description="of the log: lines for people, or one JSON object a line")
    log_prompts: bool = Field(False, description="the log has prompts and answers as text")

    @property
    def scheme(self) -> str:
        """How its address begins."""
        return "http" if self.tls_certificate is None else "https"


class Deployment(EngineConfig):
    """One deployment file."""

    server: ServerSettings = ServerSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Deployment:
        names = (self.model.name, *self.model.aliases)
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"model.aliases: {name!r} - is used twice; name and aliases must all differ")
        if (self.server.tls_certificate is None) != (self.server.tls_key is None):
            missing = "tls_key" if self.server.tls_key is None else "tls_certificate"
            raise ValueError(f"server.{missing} - is required: tls_certificate and tls_key go together")
        if self.server.max_requests_per_key is not None and not self.server.api_keys and self.server.api_keys_file is None:
            raise ValueError(
                f"server.max_requests_per_key: {self.server.max_requests_per_key} - counts by key, and there are none: "
                "set server.api_keys or server.api_keys_file"
            )
        longest = self.speculation.draft_length.max
        for name, preset in self.speculation.presets.items():
            if preset.max_draft is not None and preset.max_draft > longest:
                raise ValueError(
                    f"speculation.presets.{name}.max_draft: {preset.max_draft} - must be at most speculation.draft_length.max ({longest})"
                )
        return self

    @property
    def engine_part(self) -> EngineConfig:
        """What the engine is built from."""
        return EngineConfig(model=self.model, speculation=self.speculation, engine=self.engine)

    @property
    def model_ids(self) -> dict[str, Preset | None]:
        """Every model id that is served and its preset: the name, its aliases, and NAME:PRESET for each of them."""
        names = (self.model.name, *self.model.aliases)
        plain: dict[str, Preset | None] = dict.fromkeys(names)
        return plain | {f"{name}:{preset}": value for name in names for preset, value in self.speculation.presets.items()}


def load(path: Path, environment: Mapping[str, str] = os.environ, **options: object) -> Deployment:
    """The deployment in `path`. `options` are keys of the server's part from the command line; they win over the environment, which wins
    over the file. Raises ConfigError with one line for each mistake."""
    content = read_yaml(path, "a deployment", "configs/default.yaml")
    overrides = _from_environment(environment) | {key: (f"--{key}", value) for key, value in options.items() if value is not None}
    section = content.get("server", {})
    if isinstance(section, dict):
        content = content | {"server": section | {key: value for key, (_, value) in overrides.items()}}
    return validated(Deployment, content, path, {f"server.{key}": origin for key, (origin, _) in overrides.items()})


def validated(kind: type[S], content: dict[str, Any], path: Path, origins: Mapping[str, str] = {}) -> S:
    """What the content of a file says, as `kind`. `origins` names what set a key where that was not the file.

    Raises ConfigError with one line for each mistake.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        file = _File(kind, content, path, origins)
        raise ConfigError("\n".join(_explain(details, file) for details in error.errors(include_url=False))) from error


# ---------------------------------------------------------------------- reading
class _Loader(yaml.SafeLoader):
    """YAML without two surprises: the last of repeated keys wins, and on, off, yes and no are booleans (so `off` could name no preset)."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # pyyaml's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str, example: str) -> dict[str, Any]:
    """The keys of a file. `what` it is, and an `example` of one, are for messages. Raises ConfigError."""
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
    if content is None:
        raise ConfigError(f"{path} is empty. {example} shows every key.")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}, line 1: {what} is a mapping of keys, not a {type(content).__name__}.")
    return content


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, object]]:
    """Key of the server's part to the variable that overrides it and its value.

    An empty variable counts as unset: compose files and unit files hand over what nobody set as an empty text, and for `api_keys` that
    must not open a server whose file closes it.
    Foreign CASCADE_ variables are said, not refused: an orchestrator sets some for a service of that name.
    """
    found: dict[str, tuple[str, object]] = {}
    for variable, text in sorted(environment.items()):
        key = variable.removeprefix(ENV_PREFIX).lower()
        if not variable.startswith(ENV_PREFIX) or variable in OTHER_VARIABLES:
            continue
        if key not in ServerSettings.model_fields:
            known = {*ServerSettings.model_fields, *(other.removeprefix(ENV_PREFIX).lower() for other in OTHER_VARIABLES)}
            hint = "".join(f"; did you mean {ENV_PREFIX}{name.upper()}?" for name in _close_to(key, known)) or "."
            logger.warning("The environment variable %s is not known and changes nothing%s", variable, hint)
            continue
        if text:
            found[key] = (variable, _several(variable, text) if key in LISTS else text)
    return found


def _several(variable: str, text: str) -> list[str]:
    """The values in a list separated by commas. Only commas would set an empty list, which for keys opens the server: refused."""
    values = [part.strip() for part in text.split(",") if part.strip()]
    if not values:
        what = {"CASCADE_API_KEYS": "key", "CASCADE_CORS_ORIGINS": "origin"}.get(variable, "value")
        raise ConfigError(f"{variable}: (hidden) - holds no {what}; leave it empty to have those of the file")
    return values


# ---------------------------------------------------------------------- explaining
@dataclass(frozen=True)
class _File:
    """What a message about a file needs to know of it."""

    kind: type[Section]
    content: dict[str, Any]
    path: Path
    origins: Mapping[str, str]


def _explain(details: ErrorDetails, file: _File) -> str:
    """One line for one mistake: where it stands, key, value, bound."""
    if not details["loc"]:
        return f"{file.path}: {details['ctx']['error']}"
    key = ".".join(_keys(details, file.content))
    name = file.origins.get(key) or f"{file.path}: {key}"
    if details["type"] in ("missing", "extra_forbidden"):
        return f"{name} - {_bound(details, file.kind)}"
    if details["input"] is None:  # a key with nothing behind it; Python's word for that is not in the file
        return f"{name} - is empty; {_bound(details, file.kind)}"
    shown = "(hidden)" if re.fullmatch(r"server\.api_keys(\.\d+)?", key) else _shorten(details["input"])
    return f"{name}: {shown} - {_bound(details, file.kind)}"


def _keys(details: ErrorDetails, content: Any) -> list[str]:
    """The place of a mistake as keys of the file; pydantic's has the tag of a union among them, which is no key."""
    keys: list[str] = []
    last = details["loc"][-1] if details["type"] == "missing" else None
    for part in details["loc"]:
        is_key = part in content if isinstance(content, dict) else isinstance(content, list)
        if is_key:
            content = content[part]
        if is_key or part == last:
            keys.append(str(part))
    return keys


BOUNDS = {  # pydantic's error type to a sentence over its context
    "missing": "is required",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "greater_than": "must be more than {gt}",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must have no spaces and no colon",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "{discriminator} must be one of {expected_tags}",
    "union_tag_not_found": "needs {discriminator}",
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "byte_size": "write a size such as 1GiB or 512MiB",
    "byte_size_unit": "write a size such as 1GiB or 512MiB",
    "value_error": "{error}",
}


def _bound(details: ErrorDetails, kind: type[Section]) -> str:
    if details["type"] == "extra_forbidden":
        return f"unknown key{_suggestion(details['loc'], kind)}"
    if details["type"] in BOUNDS:
        return BOUNDS[details["type"]].format(**details.get("ctx", {}))
    return details["msg"].removeprefix("Input ")


def _suggestion(place: tuple[int | str, ...], kind: type[Section]) -> str:
    """What was probably meant by an unknown key: one of another kind, or one with nearly the same name that is allowed at this place."""
    key = str(place[-1])
    known, owners = _allowed_at(place[:-1], key, kind)
    if owners:
        return f"; {key} belongs to {owners}"
    return "".join(f"; did you mean {name}?" for name in _close_to(key, known))


def _allowed_at(place: tuple[int | str, ...], key: str, kind: type[Section]) -> tuple[set[str], str]:
    """The keys that a place has, and the other members of its union that have `key`, such as "kind ngram"."""
    schema = kind.model_json_schema()
    definitions: dict[str, dict[str, Any]] = {f"#/$defs/{name}": definition for name, definition in schema["$defs"].items()}
    node, owners = schema, ""
    for part in place:
        owners = ""
        if "discriminator" in node:  # pydantic puts the name of the member into the place
            tag, members = node["discriminator"]["propertyName"], node["discriminator"]["mapping"]
            having = [name for name, reference in members.items() if name != part and key in definitions[reference]["properties"]]
            owners = f"{tag} {' or '.join(having)}" if having else ""
            node = definitions[members[str(part)]]
        elif isinstance(part, int):
            node = node.get("items", {})
            node = definitions.get(node.get("$ref", ""), node)
        else:
            free = node.get("patternProperties", {"": node.get("additionalProperties")})  # of a mapping whose keys people choose
            node = node.get("properties", {}).get(part) or next(iter(free.values())) or {}
            node = definitions.get(node.get("$ref", ""), node)
    return set(node.get("properties", {})), owners


def _close_to(key: str, known: set[str]) -> list[str]:
    """The one known name that `key` is probably a misspelling of, or none."""
    return difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.66)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
