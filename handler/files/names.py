"""Names that others give and that become part of a path: a manifest's, a shard's, a server's."""

from __future__ import annotations

from early_exit.handler.errors import ArchiveError, EarlyExitError

_SEPARATORS = frozenset("/\\")


def bare_name(name: object, what: str, refused: type[EarlyExitError] = ArchiveError) -> str:
    """Return a name with which no path leaves the folder that it is appended to.

    Args:
        name: what was found.
        what: says what the name is of and where it was found, for the message.
        refused: the exception for any other name.

    >>> bare_name("cifar-2.0", "modelName")
    'cifar-2.0'
    """
    if (isinstance(name, str) and name and not name.startswith(".") and name.isprintable()
            and not _SEPARATORS.intersection(name)):
        return name
    raise refused(f"{what} is {name!r:.200}, expected a bare name: no slash, no backslash, no control character, and "
                  "no dot in front. It becomes part of a path, which must not lead elsewhere")
