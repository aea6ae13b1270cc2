"""`ee-watch`, also as `python -m early_exit.archiver.watch.__main__`."""

from __future__ import annotations

import sys

from early_exit.handler.allocator import restart_with_allocator


def main() -> int:
    """Run `ee-watch`; return its exit status."""
    # What is measured must hold for the server's workers. First, because all that is imported is imported anew.
    restart_with_allocator("early_exit.archiver.watch.__main__", sys.argv[1:])
    from early_exit.archiver.watch.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
