"""Errors that a user can put right."""


class ConfigurationError(ValueError):
    """A wrong setting or file, reported in one sentence that names it and says what to do.

    The command line prints only this sentence, without a traceback, and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """Return an error's message as one line: its first line, with the next appended if it ends in a colon."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first
