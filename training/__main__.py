"""`ee-train`, also as `python -m early_exit.training`."""

from __future__ import annotations

import sys

from early_exit.handler.allocator import restart_with_allocator


def main() -> int:
    """Run `ee-train`; return its exit status."""
    # What is measured must hold for the server's workers. First, because all that is imported is imported anew.
    restart_with_allocator("early_exit.training", sys.argv[1:])
    from early_exit.training.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
