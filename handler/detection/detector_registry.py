"""The tails of detectors that graphs of this process call, by identity.

Apart from the operation that calls them: torch knows that one once in a process, whichever import registered it.
"""

from __future__ import annotations

from typing import Any

TAILS: dict[str, Any] = {}
