"""Parts of a request as they are given on a command line, in curl's syntax."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

_TYPE = ";type="


@dataclass(frozen=True)
class FormFile:
    """A part of a request, and the file that holds it."""

    name: str
    file: Path
    content_type: str | None
    """The content type; None means the one that the file name tells."""


def form_file(text: str) -> FormFile:
    """Return the part that NAME=FILE;type=TYPE describes; as in curl, an @ may precede the file.

    Raises:
        argparse.ArgumentTypeError: the text has another form.

    >>> form_file("image=@cat.jpg;type=image/jpeg")
    FormFile(name='image', file=PosixPath('cat.jpg'), content_type='image/jpeg')
    """
    part, has_type, content_type = text.partition(_TYPE)
    name, _, file = part.partition("=")
    file = file.removeprefix("@")
    if not name or not file or (has_type and not content_type):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE or NAME=FILE;type=TYPE, such as image=cat.jpg, found "
                                         f"{text!r}")
    return FormFile(name, Path(file), content_type or None)


def add_form_option(parser: argparse.ArgumentParser) -> None:
    """Add --form, whose values together make one request, which `samples_of` reads."""
    parser.add_argument("--form", type=form_file, action="append", default=[], metavar="NAME=FILE[;type=TYPE]",
                        help="one part of the sample request, as in curl, instead of --request; pass it once for each "
                             "part")
