"""What can go wrong, as one tree. The class decides whether the caller or the server is at fault, never the place that raises.

EngineError
├── ClientError                 the caller's mistake; the same call fails again
│   ├── InvalidRequest          a value that cannot be served; `param` names it
│   ├── ContextLengthExceeded   prompt and answer do not fit the served context
│   └── CrashingRequest         the engine was lost each time that it ran an equal request
└── ServerError                 not the caller's mistake
    ├── QueueFull               try again after `retry_after` seconds
    ├── MemoryExhausted         the device had no memory for this request; others go on
    ├── EngineRestarting        the engine was lost and comes back; nothing was run; try again after `retry_after` seconds
    ├── EngineDead              the engine failed or was closed; what it was running is lost
    └── ConfigError             the deployment cannot be served as configured
        ├── SourceError         a model's files cannot be found, read or fetched
        ├── UnsupportedModel    the model is readable, but would be computed wrongly
        └── IncompatiblePair    target and drafter do not share a vocabulary
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of everything this package raises on purpose."""


class ClientError(EngineError):
    """The caller's mistake."""


class InvalidRequest(ClientError):
    """A value that cannot be served; `param` is the name of the request's field."""

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(ClientError):
    """Prompt and answer together are longer than the served context."""

    def __init__(self, num_prompt_tokens: int, max_tokens: int, max_model_len: int):
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, but {num_prompt_tokens + max_tokens} were asked for "
            f"({num_prompt_tokens} in the prompt, {max_tokens} for the completion). Shorten the prompt or lower max_tokens."
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.max_model_len = max_model_len


class CrashingRequest(ClientError):
    """The engine was lost each time that it ran an equal request."""

    def __init__(self, num_losses: int):
        super().__init__(
            f"The engine failed {num_losses} times while it ran a request equal to this one, which is refused for now. "
            "Change the prompt or the parameters."
        )
        self.num_losses = num_losses


class ServerError(EngineError):
    """Not the caller's mistake."""


class QueueFull(ServerError):
    """As many requests wait as the deployment allows."""

    def __init__(self, num_waiting: int, retry_after: int):
        super().__init__(f"The server is at capacity: {num_waiting} answers are waiting. Try again in {retry_after} s.")
        self.retry_after = retry_after


class MemoryExhausted(ServerError):
    """The device had no memory for even one token of this request, alone."""

    retry_after = 5

    def __init__(self) -> None:
        super().__init__("The server has too little memory for this request, which it gave up. Try again later, or shorten it.")


class EngineRestarting(ServerError):
    """The engine was lost and is being started again; nothing of the request was run."""

    def __init__(self, retry_after: int):
        super().__init__(f"The engine is being restarted, and nothing of this request was run. Try again in {retry_after} s.")
        self.retry_after = retry_after


class EngineDead(ServerError):
    """The engine failed or was closed; requests that it was running are lost."""

    @classmethod
    def of(cls, error: BaseException) -> EngineDead:
        """What clients hear of an error that nobody foresaw: not its text, which the log has, since that may quote what others asked."""
        return cls(f"The engine stopped at an internal error ({type(error).__name__}).")


class ConfigError(ServerError):
    """The deployment cannot be served as configured; raised while loading, before anything is served."""


class SourceError(ConfigError):
    """A model's files cannot be found, read or fetched."""


class UnsupportedModel(ConfigError):
    """The model is readable, but this engine would compute it wrongly."""


class IncompatiblePair(ConfigError):
    """Target and drafter do not share a vocabulary."""
