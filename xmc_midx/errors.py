"""Layer 0. The errors a user can meet: each says a fact, an expectation and a hint.

Every error that is the user's to mend is a child of `XmcMidxError`; anything else that escapes is our bug. The exit
codes are those of the command line (0 is success, 130 and 143 are signals and are set by the command line itself).
"""

from __future__ import annotations


class XmcMidxError(Exception):
    """A failure that the user can act on.

    Parameters
    ----------
    message : what was found and what was expected, with file and line where there is one.
    hint : what to do about it; None where the message says it already.
    """

    code = "error"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class UsageError(XmcMidxError):
    """An option, a configuration key or an argument that cannot be used as given."""

    code = "usage"
    exit_code = 2


class DataError(XmcMidxError):
    """A data, model or prediction file that is missing or is not what it claims to be."""

    code = "data"
    exit_code = 3


class ResourceError(XmcMidxError):
    """Memory, disk or a device that is not there, or a run directory that is in use."""

    code = "resources"
    exit_code = 4


class DownloadError(XmcMidxError):
    """A download that failed, or one that arrived but is not the expected file."""

    code = "download"
    exit_code = 5


class DivergedError(XmcMidxError):
    """Training reached a non-finite loss."""

    code = "diverged"
    exit_code = 6
