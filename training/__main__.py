"""`ee-train`, also as `python -m early_exit.training`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from early_exit.handler.allocator import restart_with_allocator


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ee-train` with the allocator of the server's workers; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Times that are measured here must hold for the server's workers, which have this allocator. The restart comes
    # first, because it repeats every import.
    restart_with_allocator()
    from early_exit.training.cli import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
