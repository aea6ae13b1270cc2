"""Run by `check` in a fresh process: tries a new archive out, with the handler code that the archive holds.

Usage: repackaged.py JOB.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    # This comes first: from here on, early_exit.handler is imported from the archive, not from the installation.
    sys.path.insert(0, json.loads(Path(sys.argv[1]).read_text())["folder"])
    from early_exit.archiver.packaging.tryout.checking import check
    from early_exit.archiver.packaging.tryout.child import answer_parent

    answer_parent(check)
