"""What the command line reports in one sentence."""


class UsageError(ValueError):
    """What the user has to change, for exit code 2; the message says in one sentence what is wrong and what is not."""


class RunFailed(RuntimeError):  # noqa: N818 - it is the run that failed.
    """A run that can't go on through no mistake of its options; the message says in one sentence why. Exit code 1."""


class AgreedError(UsageError):
    """The same on all processes of a run, which end together."""


class Interrupted(Exception):  # noqa: N818 - as KeyboardInterrupt, it is no error.
    """A run has stopped on a signal, and can go on; the message says how."""

    def __init__(self, message: str, number: int) -> None:
        """Say how to go on, and the signal's number."""
        super().__init__(message)
        self.number = number
