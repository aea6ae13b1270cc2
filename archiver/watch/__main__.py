"""`ee-watch`, also as `python -m early_exit.archiver.watch`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from early_exit.handler.allocator import restart_with_allocator


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ee-watch` with the allocator of the server's workers; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Times are measured here for the server's workers, so this process needs their allocator. The restart comes first,
    # because it repeats all imports.
    restart_with_allocator()
    os.nice(10)  # requests have priority
    from early_exit.archiver.watch.cli import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
