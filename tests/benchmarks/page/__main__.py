"""Writes docs/benchmarks.md from the result files.

    python -m tests.benchmarks.page
"""

from __future__ import annotations

from tests.benchmarks.page.page import PAGE, page, read_results

if __name__ == "__main__":
    PAGE.write_text(page(read_results()))
    print(PAGE)
