"""The one exception that means the user, not the program, has something to correct."""


class InputError(ValueError):
    """A user's input is wrong.

    The message is one line: what was wrong, with its value, and the remedy. Entry points print it
    and exit with status 2.
    """


def reason(error: BaseException) -> str:
    """What an exception of another library says, for a message of ours: one line of no more than
    200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
