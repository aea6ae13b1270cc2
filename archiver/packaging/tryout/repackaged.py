"""Run by `check` in a fresh process: tries a new archive out, with the handler's code that lies in it.

Usage: repackaged.py JOB.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    # First: what is imported of early_exit.handler from here on is the archive's, not what is installed.
    sys.path.insert(0, json.loads(Path(sys.argv[1]).read_text())["folder"])
    from early_exit.archiver.packaging.tryout.checking import check
    from early_exit.archiver.packaging.tryout.child import answer_parent

    answer_parent(check)
