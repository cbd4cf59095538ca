"""Deployment files: what is refused, and that the message names key, value and bound."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pydantic import ByteSize, ValidationError

from engine.dials import DIALS
from engine.errors import ConfigError
from server.settings import Deployment, ServerSettings, load

MODEL = "model: {name: tiny, target: {source: some/folder}}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deployment.yaml"


def loaded(file: Path, text: str, environment: dict[str, str] | None = None, **options: object) -> Deployment:
    file.write_text(text)
    return load(file, environment or {}, **options)


def refused(file: Path, text: str, environment: dict[str, str] | None = None, **options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(file, text, environment, **options)
    return [line.removeprefix(f"{file}: ") for line in str(caught.value).splitlines()]


def test_defaults_make_a_deployment(file: Path) -> None:
    deployment = loaded(file, MODEL)
    assert deployment.server == ServerSettings()
    assert deployment.engine.block_size == 16
    assert not hasattr(deployment.engine_part, "server")


def test_a_deployment_is_frozen(file: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        loaded(file, MODEL).server.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engine: {attention: magic}", "engine.attention: 'magic' - must be 'auto', 'gather', 'triton', 'varlen' or 'flashinfer'"),
        ("engine: {block_size: 0}", "engine.block_size: 0 - must be at least 1"),
        ("engine: {block_size: 5000}", "engine.block_size: 5000 - must be at most 1024"),
        ("engine: {block_size: many}", "engine.block_size: 'many' - should be a valid integer, unable to parse string as an integer"),
        ("engine: {kv_cache: 1 potato}", "engine.kv_cache: '1 potato' - write a size such as 1GiB or 512MiB"),
        ("engine: {kv_cache: 1XB}", "engine.kv_cache: '1XB' - write a size such as 1GiB or 512MiB"),
        ("engine: {kv_cache: big}", "engine.kv_cache: 'big' - write a size such as 1GiB or 512MiB"),
        ("engine: {blok_size: 16}", "engine.blok_size - unknown key; did you mean block_size?"),
        ("zebra: 1", "zebra - unknown key"),
        ("modle: {}", "modle - unknown key; did you mean model?"),
        ("prot: 1", "prot - unknown key"),  # like port, which is no key of this place
        ("server:", "server - is empty; must be a mapping of keys"),
        ("server: {log_level:}", "server.log_level - is empty; must be 'debug', 'info', 'warning' or 'error'"),
        ("server: {port: 70000}", "server.port: 70000 - must be at most 65535"),
        ("server: {host: ''}", "server.host: '' - must not be empty"),
        ("server: {max_body_bytes: 0}", "server.max_body_bytes: 0 - must be at least 1"),
        ("server: {keep_alive_seconds: 0}", "server.keep_alive_seconds: 0 - must be more than 0.0"),
        ("server: {drain_seconds: .nan}", "server.drain_seconds: nan - must be a finite number"),
        ("server: {log_level: loud}", "server.log_level: 'loud' - must be 'debug', 'info', 'warning' or 'error'"),
        ("server: {api_keys: [secret, '']}", "server.api_keys.1: (hidden) - must not be empty"),
        ("server: {api_keys: secret}", "server.api_keys: (hidden) - should be a valid tuple"),
        (
            "speculation: {draft_length: {policy: psychic}}",
            "speculation.draft_length: {'policy': 'psychic'} - 'policy' must be one of 'fixed', 'heuristic', 'confidence', 'adaptive'",
        ),
        ("speculation: {draft_length: {max: 4}}", "speculation.draft_length: {'max': 4} - needs 'policy'"),
        ("speculation: {draft_length: {policy: fixed, max: 99}}", "speculation.draft_length.max: 99 - must be at most 63"),
        (
            "speculation: {draft_length: {policy: heuristic, start: 9}}",
            "speculation.draft_length: {'policy': 'heuristic', 'start': 9} - start is 9 and must be at most max, which is 8",
        ),
        ("speculation: {draft_length: {policy: fixed, mex: 3}}", "speculation.draft_length.mex - unknown key; did you mean max?"),
        (
            "speculation: {draft_length: {policy: fixed, start: 3}}",
            "speculation.draft_length.start - unknown key; start belongs to policy heuristic",
        ),
        ("speculation: {presets: {'a:b': {}}}", "speculation.presets.a:b: 'a:b' - must have no spaces and no colon"),
        ("speculation: {presets: {a: {rul: exact}}}", "speculation.presets.a.rul - unknown key; did you mean rule?"),
        (
            "speculation: {presets: {a: {max_draft: 9}}}",
            "speculation.presets.a.max_draft: 9 - must be at most speculation.draft_length.max (8)",
        ),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_bound(file: Path, text: str, said: str) -> None:
    assert refused(file, MODEL + text) == [said]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engine: {}", "model - is required"),
        ("model: {name: a}", "model.target - is required"),
        ("model: {name: a, target: {source: b}, drafter: {kind: model}}", "model.drafter.source - is required"),
        ("model: {name: a, target: {source: b}, drafter: {kind: ngram, max_n: 0}}", "model.drafter.max_n: 0 - must be at least 1"),
        ("model: {name:, target: {source: b}}", "model.name - is empty; must be text"),
        (
            "model: {name: a, target: {source: b}, drafter: {kind: model, source: c, max_n: 3}}",
            "model.drafter.max_n - unknown key; max_n belongs to kind ngram",
        ),
        (
            "model: {name: a, target: {source: b}, drafter: {kind: none, source: c}}",
            "model.drafter.source - unknown key; source belongs to kind model",
        ),
        ("model: {name: a, target: {source: b}, drafter: {kind: ngram, maxn: 3}}", "model.drafter.maxn - unknown key; did you mean max_n?"),
        ("model: {name: a, target: {source: b, max: 3}}", "model.target.max - unknown key"),
        ("model: {name: a, target: {source: b, type: c}}", "model.target.type - unknown key; did you mean dtype?"),
        ("model: {name: a, target: {source: b}, aliases: [c, a]}", "model.aliases: 'a' - is used twice; name and aliases must all differ"),
        ("model: {name: a, target: {source: b}, aliases: [c, c]}", "model.aliases: 'c' - is used twice; name and aliases must all differ"),
        ("model: {name: 'a:b', target: {source: b}}", "model.name: 'a:b' - must have no spaces and no colon"),
    ],
)
def test_mistakes_in_the_model(file: Path, text: str, said: str) -> None:
    assert refused(file, text) == [said]


def test_all_mistakes_are_said_at_once(file: Path) -> None:
    assert refused(file, MODEL + "engine: {block_size: 0, max_sequences: 0}") == [
        "engine.max_sequences: 0 - must be at least 1",
        "engine.block_size: 0 - must be at least 1",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty. configs/default.yaml shows every key."),
        ("# nothing\n", "is empty. configs/default.yaml shows every key."),
        ("just text", ", line 1: a deployment is a mapping of keys, not a str."),
        (MODEL + "engine: [", ", line 2: expected the node content, but found '<stream end>'."),
        (MODEL + "engine: {}\nengine: {}", ", line 3: the key engine is given twice."),
        ("model:\n  name: a\n  name: b\n", ", line 3: the key name is given twice."),
        ("a: !!python/object:os.system {}", ", line 1: could not determine a constructor"),
        ("? [a]\n: b", ", line 1: found unhashable key."),
        ("a: \x07", " is not YAML: "),
    ],
)
def test_malformed_yaml_is_one_line_with_its_number(file: Path, text: str, said: str) -> None:
    (line,) = refused(file, text)
    assert said in line


def test_files_that_cannot_be_read(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read: No such file or directory\."):
        load(tmp_path / "absent.yaml", {})
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(file, {})


# ---------------------------------------------------------------------- environment and command line
def test_the_environment_overrides_the_servers_part(file: Path) -> None:
    environment = {
        "CASCADE_HOST": "0.0.0.0",
        "CASCADE_PORT": "9000",
        "CASCADE_API_KEYS": "one, two",
        "CASCADE_MAX_QUEUED_REQUESTS": "7",
        "CASCADE_MAX_BODY_BYTES": "2MiB",
        "CASCADE_DRAIN_SECONDS": "1.5",
        "CASCADE_KEEP_ALIVE_SECONDS": "2",
        "CASCADE_LOG_LEVEL": "debug",
    }
    server = loaded(file, MODEL + "server: {port: 1}", environment).server
    assert server == ServerSettings(
        host="0.0.0.0",
        port=9000,
        api_keys=("one", "two"),
        max_queued_requests=7,
        max_body_bytes=ByteSize(2 << 20),
        drain_seconds=1.5,
        keep_alive_seconds=2.0,
        log_level="debug",
    )


@pytest.mark.parametrize(
    ("drafter", "speculation", "said"),
    [
        ("ngram", "rule: chow", "speculation.rule: chow - reads the drafter's probabilities, and a drafter of kind ngram has none"),
        (
            "none",
            "presets: {x: {rule: opt}}",
            "speculation.presets.x.rule: opt - reads the drafter's probabilities, and a drafter of kind none",
        ),
        ("ngram", "rule: token_v3, alpha: 1.5", "speculation.alpha: 1.5 - must be at most 1 for the rule token_v3"),
        ("ngram", "rule: token_v3, alpha: .nan", "speculation.alpha: nan - must be at most 1 for the rule token_v3"),
        ("ngram", "rule: exact, alpha: 0.1", "speculation.alpha: 0.1 - must be left out for the rule exact"),
        (
            "ngram",
            "rule: token_v3, presets: {x: {alpha: -2}}",
            "speculation.presets.x.alpha: -2 - must be at least -1 for the rule token_v3",
        ),
        ("ngram", "max_alpha: {token_v3: 3}", "speculation.max_alpha.token_v3: 3 - must be at most 1 for the rule token_v3"),
        ("ngram", "rule: best", "speculation.rule: 'best' - "),
        ("ngram", "allow_rules: [best]", "speculation.allow_rules.0: 'best' - "),
        ("ngram", "verification: tree", "speculation.verification: 'tree' - "),
    ],
)
def test_rules_that_cannot_judge_are_refused(file: Path, drafter: str, speculation: str, said: str) -> None:
    text = f"model: {{name: a, target: {{source: b}}, drafter: {{kind: {drafter}}}}}\nspeculation: {{{speculation}}}"
    (line,) = refused(file, text)
    assert said in line


def test_alpha_comes_from_the_nearest_that_names_it(file: Path) -> None:
    presets = "{a: {}, b: {alpha: 0.5}, c: {rule: token_v2}, d: {rule: token_v3}, e: {rule: exact}}"
    text = f"{MODEL}speculation: {{rule: token_v3, alpha: 0.4, presets: {presets}}}"
    found = loaded(file, text).speculation
    assert found.judged_by() == ("token_v3", 0.4)
    judged = {name: found.judged_by(preset) for name, preset in found.presets.items()}
    assert judged == {
        "a": ("token_v3", 0.4),
        "b": ("token_v3", 0.5),
        "c": ("token_v2", DIALS["token_v2"].default),
        "d": ("token_v3", 0.4),
        "e": ("exact", 0.0),
    }


@pytest.mark.parametrize("key", ServerSettings.model_fields)
def test_an_empty_variable_is_unset(file: Path, key: str) -> None:
    """docker-compose.yml hands CASCADE_API_KEYS over as an empty text where nobody set it; the keys of the file must hold."""
    text = MODEL + "server: {api_keys: [secret], port: 1, host: localhost, drain_seconds: 7}"
    assert loaded(file, text, {f"CASCADE_{key.upper()}": ""}) == loaded(file, text)


@pytest.mark.parametrize("value", [" ", ",", " , ", ",,"])
def test_a_variable_without_any_key_is_refused(file: Path, value: str) -> None:
    said = refused(file, MODEL + "server: {api_keys: [secret]}", {"CASCADE_API_KEYS": value})
    assert said == ["CASCADE_API_KEYS: (hidden) - holds no key; leave it empty to have those of the file"]


def test_a_bad_variable_is_named(file: Path) -> None:
    said = refused(file, MODEL, {"CASCADE_PORT": "http"})
    assert said == ["CASCADE_PORT: 'http' - should be a valid integer, unable to parse string as an integer"]


def test_the_command_line_wins_over_the_environment(file: Path) -> None:
    assert loaded(file, MODEL, {"CASCADE_PORT": "9000"}, port=9001, host=None).server.port == 9001
    assert refused(file, MODEL, {"CASCADE_PORT": "9000"}, port=99999) == ["--port: 99999 - must be at most 65535"]


def test_unknown_variables_are_said(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded(
            file,
            MODEL,
            dict.fromkeys(("CASCADE_PROT", "CASCADE_CACHE_DIR", "CASCADE_CACHE", "CASCADE_ENGINE", "CASCADE_SERVICE_HOST", "OTHER"), "x"),
        )
    assert [record.getMessage().removeprefix("The environment variable ") for record in caplog.records] == [
        "CASCADE_CACHE is not known and changes nothing; did you mean CASCADE_CACHE_DIR?",
        "CASCADE_ENGINE is not known and changes nothing.",
        "CASCADE_PROT is not known and changes nothing; did you mean CASCADE_PORT?",
        "CASCADE_SERVICE_HOST is not known and changes nothing.",
    ]


def test_every_id_is_served_with_every_preset(file: Path) -> None:
    deployment = loaded(
        file, "model: {name: a, aliases: [b], target: {source: c}}\nspeculation: {presets: {exact: {rule: exact}, off: {enabled: false}}}"
    )
    assert list(deployment.model_ids) == ["a", "b", "a:exact", "a:off", "b:exact", "b:off"]
    assert deployment.model_ids["a"] is None
    assert deployment.model_ids["b:off"] is deployment.speculation.presets["off"]


def test_every_key_has_a_sentence() -> None:
    for name, field in ServerSettings.model_fields.items():
        assert field.description or name == "log_level"
