"""Write docs/benchmarks.md and the README's picture from the result files.

    python -m tests.benchmarks.page
"""

from __future__ import annotations

from tests.benchmarks.page.page import PAGE, PICTURE, page, picture, read_results

if __name__ == "__main__":
    results = read_results()
    PAGE.write_text(page(results))
    PICTURE.write_text(picture(results))
    print(PAGE, PICTURE, sep="\n")
