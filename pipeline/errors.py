"""The failures of a command that are not a bug of this program."""

EXIT_USER, EXIT_DIVERGED = 2, 3
EXIT_NODE = 69  # a node is not fit to train on; EX_UNAVAILABLE of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class UserError(Exception):
    """The user can fix this. The text is one line: what is wrong, what was found, what was
    expected, how to fix it.

    The command prints it without a traceback and exits with code 2.
    """


class Diverged(Exception):
    """Training skipped too many steps in a row. The command exits with code 3."""


class NodeFailed(Exception):
    """A node is not fit to train on; the text names it. The command exits with code 69, and
    train.sbatch queues the job again without the node.
    """


def one_line(error: BaseException) -> str:
    """The message of another library's error, for use inside a line."""
    return " ".join(str(error).split()) or type(error).__name__
