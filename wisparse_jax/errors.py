"""The errors that bad input raises; each message names the file, tensor or field at fault."""

LONGEST = 1_000  # characters of a message; what a file holds may be longer


class WisparseError(ValueError):
    """Input that cannot be used: what was read, what was expected, what was found.

    The message is one printable line, whatever names and values it quotes: control characters and lone surrogates
    are escaped, and a very long one is cut in the middle.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        half = LONGEST // 2
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}")


class ConfigError(WisparseError):
    """A model or search configuration that cannot be used."""


class WeightsError(WisparseError):
    """Model weights that are missing, unexpected, mis-shaped, damaged or non-finite."""


class PlanError(WisparseError):
    """A sparsity plan that is damaged or does not belong to the model."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which may be of several or empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
