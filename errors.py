"""The one exception type a user of onevision-edge sees."""


class OneVisionError(Exception):
    """A mistake in what the user gave, or a limit they met.

    The message is one sentence or two: what is wrong, where, and what to do about it. The command
    line prints it without a stack trace and exits with 1.
    """
