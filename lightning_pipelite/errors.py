"""What a user can put right."""


class ConfigurationError(ValueError):
    """A wrong setting or file, told in one sentence that names it and says what to do.

    The command line prints the sentence alone, without a traceback, and exits with status 2.
    """
