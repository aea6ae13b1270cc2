"""Write the documentation pages that are made from the code. `make docs` runs this before MkDocs."""

from __future__ import annotations

from collections.abc import Callable

from tests.site.messages import messages_page
from tests.site.reference import commands_page, configuration_page
from tests.site.versions import versions_page
from tests.support.documents import ROOT

PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration_page, "commands.md": commands_page, "messages.md": messages_page,
    "versions.md": versions_page}
"""The function that returns each page. Keys are the names of files in docs/."""


def main() -> None:
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page())


if __name__ == "__main__":
    main()
