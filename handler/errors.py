"""The exceptions of the project; a message says what was expected, what was found, where, and what to do."""

from __future__ import annotations


class EarlyExitError(Exception):
    """A user can mend this: the command-line tools print the message without a traceback."""


class ConfigError(EarlyExitError):
    """The ``early_exit:`` block of model-config.yaml holds a wrong key or value."""


class GraphError(EarlyExitError):
    """The backbone cannot be exported, or cannot be cut where it was asked to be."""


class InputError(EarlyExitError):
    """A batch does not fit the backbone's input: the client's mistake, answered with a 4xx."""


class PlanError(EarlyExitError):
    """An exit plan is unreadable, incomplete, or was made for another backbone."""


class RecordError(EarlyExitError):
    """Records are missing, unreadable, contradictory or too few."""


class ArchiveError(EarlyExitError):
    """A model archive cannot be read, built or loaded."""


class FormatError(EarlyExitError):
    """A file has a format that this version does not read, most often one of a newer version."""


class ServerError(EarlyExitError):
    """TorchServe did not start, refused a request, or did not answer in time."""
