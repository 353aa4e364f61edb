"""What a user can put right."""


class ConfigurationError(ValueError):
    """A wrong setting or file, told in one sentence that names it and says what to do.

    The command line prints the sentence alone, without a traceback, and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """Return what ``error`` says, in one line: its first, with the next where that one ends in a colon."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first
