"""The errors portlm raises for what a user can cause, each with the exit code the command line gives it.

Every message says what is wrong, where, and what to do about it, in one line.
"""


class PortlmError(Exception):
    """Base of every error that is the input's or the machine's fault, not a bug."""

    exit_code = 1


class UsageError(PortlmError, ValueError):
    """An argument that cannot work: an unknown name, a number out of range, two options that exclude each other."""

    exit_code = 2


class ConfigError(UsageError):
    """A model or training configuration that contradicts itself."""


class FormatError(PortlmError):
    """A file that is missing, truncated, altered or not what it claims to be. Its name is in the message."""


class ContextLengthError(UsageError):
    """More tokens than the model has positions for. Nothing is ever truncated silently."""

    def __init__(self, tokens: int, limit: int, what: str = "the prompt", advice: str = ""):
        advice = advice or f"shorten it by {tokens - limit} tokens"
        super().__init__(
            f"{what} has {tokens} tokens, but the model's context holds {limit}: {advice}, "
            "or train with a longer context"
        )
        self.tokens, self.limit = tokens, limit


class EngineUnavailableError(PortlmError):
    """An engine or device that this machine does not have. The message names the command that adds it."""


class ExtensionError(EngineUnavailableError, ImportError):
    """portlm's compiled extension is missing or cannot be loaded, so what needs its kernels cannot run."""


class PlacementError(PortlmError):
    """A node would have run on another device than the one asked for."""


class ParityError(PortlmError):
    """An engine does not give the answer of the reference."""


class DivergenceError(PortlmError):
    """The training loss is no longer finite. The last good checkpoint is kept."""


class StorageError(PortlmError):
    """The disk is full or refuses the write. What was there before is untouched."""
