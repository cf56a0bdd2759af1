"""How a command ends other than well: what the user can fix, what a retry may fix, and what diverged."""

import errno

EXIT_USER, EXIT_DIVERGED = 2, 3
EXIT_RETRY = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed, as after a lost rank, or where a site does not requeue
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# Errors of a call that this program got wrong; every other one is about a path, a disk or a limit.
_CALLS_GONE_WRONG = (errno.EBADF, errno.EINVAL, errno.EFAULT, errno.ECHILD, errno.ESRCH, errno.EPIPE)
_REMEDIES = {
    errno.ENOSPC: "make room or choose another path",
    errno.EDQUOT: "make room within the quota or choose another path",
    errno.EFBIG: "raise the file-size limit (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free memory",
}


class Failure(Exception):
    """Ends the command with one line, without a traceback, and with `code`."""

    code = EXIT_RETRY


class UserError(Failure):
    """The user can fix this. The text is one line: what is wrong, what was found, what was
    expected, how to fix it.
    """

    code = EXIT_USER


class Diverged(Failure):
    """Training skipped too many steps in a row."""

    code = EXIT_DIVERGED


class NodeFailed(Failure):
    """A node is not fit to train on; the text names it. train.sbatch queues the job again without it."""

    code = 69  # EX_UNAVAILABLE


class Left(SystemExit):
    """Ends this process silently, as another rank prints `reason`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code)
        self.reason = reason


def one_line(error: BaseException) -> str:
    """The message of another library's error, for use inside a line."""
    return " ".join(str(error).split()) or type(error).__name__


def as_failure(error: BaseException) -> Failure | None:
    """`error` as the line that ends a command; None for a bug of ours, which ends it with a traceback.

    An OSError is a full disk, a quota, a missing permission, a stale handle: not a bug.
    """
    if isinstance(error, Failure):
        return error
    if not isinstance(error, OSError) or error.errno in _CALLS_GONE_WRONG:
        return None
    # Of a rename, the name that people know is the second one.
    where = error.filename2 or error.filename or "while writing"
    remedy = _REMEDIES.get(error.errno or 0, "check the path and its disk, or choose another path")
    # Libraries such as numpy raise it without a number.
    return UserError(f"{error.strerror or one_line(error)}: {where}; {remedy}, then run the command again")


def code_of(error: BaseException) -> int:
    """The exit code of a command that `error` ends."""
    if isinstance(error, Left):
        return int(error.code or 0)
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(as_failure(error), "code", 1)


def reason_of(error: BaseException) -> str:
    """Why a command ended, for status.json and the log: the line that is printed or, of a bug, its type too."""
    if isinstance(error, Left):
        return error.reason
    return str(as_failure(error) or f"{type(error).__name__}: {one_line(error)}")
