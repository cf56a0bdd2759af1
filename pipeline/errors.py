"""The two ways a command ends badly that are not a bug of ours."""

EXIT_USER, EXIT_DIVERGED, EXIT_INTERRUPTED = 2, 3, 130


class UserError(Exception):
    """The user can mend this. The text is one line: what is wrong, what was found, what was wanted, how to mend it.

    The command prints it without a traceback and exits with code 2.
    """


class Diverged(Exception):
    """Training produced too many losses or gradients that are not finite. The command exits with code 3."""


def one_line(error: BaseException) -> str:
    """What another library said, for use in a line of ours."""
    return " ".join(str(error).split()) or type(error).__name__
