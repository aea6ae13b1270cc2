"""If CI is set, a test may be skipped only for an allowed reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import skips
from tests.support.skips import ALLOWED

REASON = "no browser is installed"
WAYS = {"call": f"def test_it(): pytest.skip('{REASON}')",
        "mark": f"@pytest.mark.skip(reason='{REASON}')\ndef test_it(): pass",
        "module": f"pytest.skip('{REASON}', allow_module_level=True)",
        "import": "pytest.importorskip('no_such_module')",
        "expected failure": "@pytest.mark.xfail(reason='one day')\ndef test_it(): assert False",
        "unexpected success": "@pytest.mark.xfail(reason='one day')\ndef test_it(): pass"}


@pytest.fixture(autouse=True)
def no_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the second in which pytest looks for installed plugins."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def run(folder: Path, code: str) -> bool:
    """Run a test file in this process, with the same plugin as our own tests; return whether nothing failed."""
    (folder / f"test_{folder.name}.py").write_text(f"import pytest\n{code}\n")
    ended = pytest.main(["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "--rootdir", str(folder),
                         str(folder)], plugins=[skips])
    return ended in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


@pytest.mark.parametrize("way", WAYS)
def test_an_unexpected_skip_fails_in_ci_and_nowhere_else(way: str, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert not run(tmp_path, WAYS[way])
    monkeypatch.delenv("CI")
    assert run(tmp_path, WAYS[way])


def test_an_allowed_skip_passes_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert run(tmp_path, "\n".join(f"def test_{number}(): pytest.skip({reason + ': so it is here'!r})"
                                   for number, reason in enumerate(ALLOWED)))
