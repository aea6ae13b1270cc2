"""The exceptions of the project; a message says what was expected, what was found, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from enum import Enum


class Unsupported(str, Enum):
    """The kinds of models that cannot have early exits, whatever the user changes in the archive."""

    TORCHSCRIPT = "TorchScript"
    """The model, or a part of it, is compiled or packed by TorchScript."""
    AOT_LIBRARY = "AOT library"
    SESSION = "ONNX or TensorRT session"
    NO_MODULE = "no torch module"
    """The handler calls no `torch.nn.Module` that its names reach."""
    CONTROL_FLOW = "control flow on values"
    SEVERAL_SCORES = "several score outputs"
    CHANGES = "changes per request"
    """The model changes from request to request."""


class EarlyExitError(Exception):
    """An error that a user can fix: the command-line tools print the message without a traceback."""

    def __init__(self, message: str = "", unsupported: Unsupported | None = None) -> None:
        super().__init__(message)
        self.unsupported = unsupported
        """The kind of model that causes the error, if no change of the archive can fix it."""


class ConfigError(EarlyExitError):
    """A setting, an option or a file with settings holds a wrong key or value."""


class GraphError(EarlyExitError):
    """The backbone cannot be exported, or cannot be cut at the requested places."""


class InputError(EarlyExitError):
    """A batch does not fit the backbone's input: the client's mistake, answered with a 4xx."""


class PlanError(EarlyExitError):
    """An exit plan is unreadable, incomplete, or was made for another backbone."""


class RecordError(EarlyExitError):
    """Records are missing, unreadable, contradictory or too few."""


class TooFewRecordsError(RecordError):
    """Records or labels are too few to certify anything, whatever the losses are: nobody has looked at them yet."""

    def __init__(self, message: str = "", needed: int | None = None) -> None:
        super().__init__(message)
        self.needed = needed
        """About how many records, newer than the last certificate, are needed in all; None if that is not known."""


class ArchiveError(EarlyExitError):
    """A model archive cannot be read, built or loaded."""


class ForeignFileError(EarlyExitError, PermissionError):
    """A file or folder that should be ours belongs to somebody else, is a link, or is no regular file."""


class FormatError(EarlyExitError):
    """A file has a format that this version does not read, most often one of a newer version."""


class ServerError(EarlyExitError):
    """A server did not start, refused a request, or did not answer in time."""


def did_you_mean(name: object, known: Sequence[str]) -> str:
    """Return a hint about an unknown name: the known name that it resembles, or all known names.

    >>> did_you_mean("sampling", ["sampling_rate", "pool"]), did_you_mean("zzz", ["sampling_rate", "pool"])
    ("did you mean 'sampling_rate'?", 'expected one of sampling_rate, pool')
    """
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
