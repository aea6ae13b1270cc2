"""The contents of the documents, in a form that tests can run and compare."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_OPTIONAL = ("...", "not used:")
"""The beginnings of lines that the output of a run may lack."""
README = ROOT / "README.md"
PAGES = tuple(sorted((ROOT / "docs").glob("*.md")))
DOCUMENTS = (README, *PAGES)
LOOP, SWITCH, LIVE_PAGE, TUTORIAL, MIGRATION, MODES, ENGINES = (ROOT / "docs" / f"{name}.md" for name in (
    "loop", "switch", "live-page", "own-images", "migrate", "modes", "engines"))
"""The pages with commands. Tests follow them with a `tests.support.reader.Reader`."""


@dataclass(frozen=True)
class Shown:
    """A command, and the lines of output that a document shows below it."""

    command: str
    output: tuple[str, ...]

    def missing(self, printed: str) -> list[str]:
        """Return the shown lines that were not printed. Numbers and names in them may differ."""
        forms = {form(line) for line in printed.splitlines()}
        return [line for line in self.output
                if line.strip() and not line.strip().startswith(_OPTIONAL) and form(line) not in forms]


def blocks(document: Path) -> list[str]:
    """Return the contents of the fenced blocks, in order."""
    return re.findall(r"^```\w*\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[Shown]:
    """Return the commands after a prompt, in order, each with the output that is shown."""
    found: list[Shown] = []
    for block in blocks(document):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append(Shown(command, tuple(output.splitlines())))
    return found


def form(line: str) -> str:
    """Return a line without what differs from run to run: words that contain digits, structures of heads, and spaces.

    >>> form("  layer1.0   0.14  6.1%") == form("layer4.1 0.2 12%")
    True
    """
    line = re.sub(r"\bpool \d.*", "#", line)
    words = ["#" if any(character.isdigit() for character in word) else word for word in line.split()]
    return re.sub(r"(#[,;]? ?)+", "# ", " ".join(words)).strip()


def table(document: Path, first: str) -> dict[str, tuple[str, ...]]:
    """Return the rows of the table whose first column has the given title, by their cells in that column."""
    lines = document.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows: dict[str, tuple[str, ...]] = {}
    for line in lines[start + 2:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        rows[cells[0].strip("` |")] = tuple(cells[1:])
    return rows
