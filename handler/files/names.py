"""Names that come from elsewhere, such as a manifest, a shard or a server, and become part of a path."""

from __future__ import annotations

from early_exit.handler.errors import ArchiveError, EarlyExitError

_SEPARATORS = frozenset("/\\")


def bare_name(name: object, what: str, refused: type[EarlyExitError] = ArchiveError) -> str:
    """Return a name after checking that it cannot lead out of the folder that it is appended to.

    Args:
        name: the name that was found.
        what: describes the name and where it was found, for the message.
        refused: the exception that is raised for any other name.

    >>> bare_name("cifar-2.0", "modelName")
    'cifar-2.0'
    """
    if (isinstance(name, str) and name and not name.startswith(".") and name.isprintable()
            and not _SEPARATORS.intersection(name)):
        return name
    raise refused(f"{what} is {name!r:.200}, expected a bare name: no slash, no backslash, no control character, and "
                  "no dot in front. It becomes part of a path, which must not lead elsewhere")
