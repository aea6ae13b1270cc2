"""Writes docs/benchmarks.md from the result files.

    python -m tests.benchmarks.page
"""

from __future__ import annotations

from tests.benchmarks.page.page import PAGE, page, read_results

if __name__ == "__main__":
    results = read_results()
    PAGE.write_text(page(results))
    print(PAGE)
