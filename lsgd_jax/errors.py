"""What the command line reports in one sentence, with exit code 2."""


class UsageError(ValueError):
    """A user's mistake; the message says in one sentence what is wrong, which value, and what would be right."""
