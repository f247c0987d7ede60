"""What the command line reports in one sentence."""


class UsageError(ValueError):
    """A user's mistake; the message says in one sentence what is wrong, which value, and what would be right.

    The exit code is 2.
    """


class RunFailed(RuntimeError):  # noqa: N818 - it is the run that failed.
    """A run that can't go on through no mistake of its options; the message says in one sentence why. Exit code 1."""
