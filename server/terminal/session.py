"""A conversation of `cascade chat` and its settings: what a request says, and what lines that begin with / change. Asks nobody."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.terminal.client import ChatError, Controls, Rule, Variant


class Quit(Exception):
    """The conversation is to end."""


@dataclass
class Settings:
    """What is asked for. None leaves it to the preset, or to the server."""

    model: str
    rule: str | None = None
    alpha: float | None = None
    enabled: bool | None = None
    max_draft: int | None = None
    temperature: float | None = 0.0
    seed: int | None = None
    max_tokens: int | None = None


@dataclass
class Session:
    """The turns so far, and how the next is asked. Methods named after commands return what there is to say."""

    controls: Controls
    settings: Settings
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    def body(self, prompt: str) -> dict[str, Any]:
        """The request that asks `prompt` next."""
        asked, system = self.settings, [{"role": "system", "content": self.system}] if self.system else []
        speculation = {"rule": asked.rule, "alpha": asked.alpha, "enabled": asked.enabled, "max_draft": asked.max_draft}
        sampling = {"temperature": asked.temperature, "seed": asked.seed, "max_tokens": asked.max_tokens}
        return {
            "model": asked.model,
            "messages": [*system, *self.turns, {"role": "user", "content": prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "speculation": _given(speculation) | {"provenance": True},
            **_given(sampling),
        }

    def answered(self, prompt: str, answer: str) -> None:
        """Keep a turn; one that was stopped before its first word never was."""
        if answer:
            self.turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    def command(self, line: str) -> str:
        """Do what a line that begins with / says. Raises ChatError for what cannot be done, and Quit."""
        name, _, rest = line[1:].partition(" ")
        if name not in COMMANDS:
            raise ChatError(f"/{name} is no command. /help lists them.")
        return COMMANDS[name].do(self, rest.strip())

    # ------------------------------------------------------------------ commands
    def preset(self, name: str) -> str:
        """Choose a preset, and with it what it says; nothing set for drafting before counts any more."""
        found = [model for model in self.controls.models if name in (model.preset, model.id)]
        if not found:
            raise ChatError(f"{name or 'Which?'} - the presets are {', '.join(_name_of(model) for model in self.controls.models)}.")
        self.settings.model = found[0].id
        self.settings.rule = self.settings.alpha = self.settings.enabled = self.settings.max_draft = None
        return self.summary()

    def rule(self, text: str) -> str:
        name, _, alpha = text.partition(" ")
        rule = self._rule(name)
        if not rule.allowed and name != self._variant().rule:
            raise ChatError(f"{name} is not allowed here but in presets; a request may ask for {self._rules()}.")
        value = _checked(rule, alpha) if alpha.strip() else None
        self.settings.rule, self.settings.alpha = name, value
        return self.summary()

    def alpha(self, text: str) -> str:
        self.settings.alpha = _checked(self._rule(self._judged_by()), text)
        return self.summary()

    def draft(self, text: str) -> str:
        if text in ("on", "off"):
            self.settings.enabled = text == "on"
        else:
            self.settings.max_draft = _whole(text, 0, self.controls.max_draft)
        return self.summary()

    def temperature(self, text: str) -> str:
        value = _number(text)
        if not 0 <= value <= 2:
            raise ChatError(f"{text} - temperatures are at least 0 and at most 2.")
        self.settings.temperature = value
        return self.summary()

    def seed(self, text: str) -> str:
        self.settings.seed = None if text == "random" else _whole(text, 0, 2**63)
        return self.summary()

    def max_tokens(self, text: str) -> str:
        self.settings.max_tokens = None if text == "all" else _whole(text, 1, 2**31 - 1)
        return self.summary()

    def say_first(self, text: str) -> str:
        self.system = text
        return "The system message is set." if text else "There is no system message."

    def new(self, _: str) -> str:
        self.turns.clear()
        return "A new conversation."

    def rules(self, _: str) -> str:
        return "\n".join(f"{rule.name:10} {_range(rule):20} {rule.keeps}" for rule in self.controls.rules)

    def help(self, _: str) -> str:
        return "\n".join(f"/{name} {entry.takes:22} {entry.what}" for name, entry in COMMANDS.items())

    def show(self, _: str) -> str:
        return self.summary()

    def quit(self, _: str) -> str:
        raise Quit

    def summary(self) -> str:
        """The settings in a line."""
        asked, variant = self.settings, self._variant()
        is_enabled = variant.enabled if asked.enabled is None else asked.enabled
        judged = f"rule {self._judged_by()}{self._alpha()}" if is_enabled else "no drafts"
        length = "" if asked.max_draft is None or not is_enabled else f", up to {asked.max_draft} drafts"
        seed = "" if asked.seed is None else f", seed {asked.seed}"
        temperature = "" if asked.temperature is None else f", temperature {asked.temperature:g}"
        return f"{asked.model}: {judged}{length}{temperature}{seed}"

    # ------------------------------------------------------------------ what is set
    def _variant(self) -> Variant:
        return next(model for model in self.controls.models if model.id == self.settings.model)

    def _judged_by(self) -> str:
        return self.settings.rule or self._variant().rule

    def _alpha(self) -> str:
        own, rule, variant = self.settings.alpha, self._rule(self._judged_by()), self._variant()
        if rule.alpha is None:
            return ""
        value = own if own is not None else variant.alpha if rule.name == variant.rule else rule.alpha.default
        return "" if value is None else f" at {value:g}"

    def _rule(self, name: str) -> Rule:
        for rule in self.controls.rules:
            if rule.name == name:
                return rule
        raise ChatError(f"{name or 'Which?'} - the rules are {self._rules()}; /rules explains them.")

    def _rules(self) -> str:
        return ", ".join(rule.name for rule in self.controls.rules if rule.allowed)


@dataclass(frozen=True)
class Command:
    takes: str
    what: str
    do: Callable[[Session, str], str]


COMMANDS: Mapping[str, Command] = {
    "preset": Command("NAME", "take a preset of the deployment", Session.preset),
    "rule": Command("NAME [ALPHA]", "which drafts may stand", Session.rule),
    "alpha": Command("NUMBER", "the rule's dial", Session.alpha),
    "draft": Command("N | on | off", "how many tokens are drafted at a time, or whether", Session.draft),
    "temperature": Command("NUMBER", "0: the likeliest token", Session.temperature),
    "seed": Command("N | random", "the same seed gives the same answer", Session.seed),
    "max": Command("N | all", "longest answer, in tokens", Session.max_tokens),
    "system": Command("[TEXT]", "what the model is told first; nothing: nothing", Session.say_first),
    "new": Command("", "forget the conversation", Session.new),
    "settings": Command("", "say what is set", Session.show),
    "rules": Command("", "explain the rules", Session.rules),
    "help": Command("", "this list", Session.help),
    "quit": Command("", "end; so do Ctrl-D and Ctrl-C", Session.quit),
}


def start(controls: Controls, model: str | None) -> Session:
    """A session with a server. Raises ChatError for a model that it does not have."""
    session = Session(controls, Settings(controls.model))
    if model is not None:
        session.preset(model)
    return session


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _name_of(model: Variant) -> str:
    return model.preset or model.id


def _checked(rule: Rule, text: str) -> float:
    """An alpha that the rule takes. Raises ChatError."""
    value = _number(text)
    if rule.alpha is None:
        raise ChatError(f"The rule {rule.name} has no alpha.")
    low, high = rule.alpha.low, rule.alpha.high
    if (low is not None and value < low) or (high is not None and value > high):
        raise ChatError(f"{value:g} - alpha of {rule.name} is {_range(rule)}.")
    return value


def _range(rule: Rule) -> str:
    if rule.alpha is None:
        return ""
    low, high = rule.alpha.low, rule.alpha.high
    if low is None and high is None:
        return "any number"
    return f"from {low:g}" if high is None else f"up to {high:g}" if low is None else f"{low:g} to {high:g}"


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise ChatError(f"{text or 'Which?'} - must be a number.")
    return value


def _whole(text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text[:20]) <= high):
        raise ChatError(f"{text or 'Which?'} - must be a whole number from {low} to {high}.")
    return int(text)
