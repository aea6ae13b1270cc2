"""Whether a client would notice that another archive answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from early_exit.archiver.packaging.tryout import answers
from early_exit.archiver.packaging.tryout.comparison import differences

OF_THE_HANDLER = "x-model"
"""The header with which the handlers of habits mark answers whose status they have set themselves."""
_ERROR = 400


@dataclass(frozen=True)
class Answer:
    """The answer that a client got."""

    status: int
    """The HTTP status, or 0 without an answer."""
    headers: Mapping[str, str]
    """The headers by their names in lower case."""
    body: bytes

    @property
    def compared(self) -> answers.Answer:
        return answers.Answer(self.status, self.headers.get("content-type", ""), self.body)


def difference(found: Answer, expected: Answer, again: Answer, *, exact: bool = False) -> str:
    """Return how an answer differs from the expected one, or an empty text if it does not.

    Args:
        found: the answer.
        expected: the answer of the original.
        again: the original's answer to the same request a second time. Where the original's two answers differ, nothing
            is expected.
        exact: whether the text of an error has to be the same.
    """
    marks = (answer.headers.get(OF_THE_HANDLER) for answer in (found, expected))
    if not exact and expected.status >= _ERROR and found.status >= _ERROR and not any(marks):
        return ""  # TorchServe only says that the handler failed, and ours says why
    if found.headers.get(OF_THE_HANDLER) != expected.headers.get(OF_THE_HANDLER):
        return f"the header {OF_THE_HANDLER} has become {found.headers.get(OF_THE_HANDLER)}"
    unstable = [path for path, _ in differences(expected.compared, again.compared)]
    told = [f"{path}: {how}" for path, how in differences(expected.compared, found.compared)
            if not any(path == known or path.startswith((f"{known}.", f"{known}[")) for known in unstable)]
    return f"{'; '.join(told[:3])}, before {expected.compared}, now {found.compared}" if told else ""
