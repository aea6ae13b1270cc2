"""Whether a client would notice that something else answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from early_exit.archiver.packaging.tryout import answers
from early_exit.archiver.packaging.tryout.comparison import differences

OF_THE_HANDLER = "x-model"
"""Header by which the handlers of habits mark answers with a status of their own."""
_ERROR = 400


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    status: int
    """HTTP status; 0 where there was no answer."""
    headers: Mapping[str, str]
    """By name in lower case."""
    body: bytes

    @property
    def compared(self) -> answers.Answer:
        return answers.Answer(self.status, self.headers.get("content-type", ""), self.body)


def difference(found: Answer, expected: Answer, again: Answer, *, exact: bool = False) -> str:
    """Return in what an answer differs from the expected one; empty where it does not.

    Args:
        found: the answer.
        expected: what the original answers.
        again: what the original answers to the same request once more: where it differs from itself, nothing is
            expected.
        exact: whether the text of an error has to be the same.
    """
    marks = (answer.headers.get(OF_THE_HANDLER) for answer in (found, expected))
    if not exact and expected.status >= _ERROR and found.status >= _ERROR and not any(marks):
        return ""  # where the handler fails, TorchServe says no more than that; ours says what is wrong
    if found.headers.get(OF_THE_HANDLER) != expected.headers.get(OF_THE_HANDLER):
        return f"the header {OF_THE_HANDLER} has become {found.headers.get(OF_THE_HANDLER)}"
    unstable = [path for path, _ in differences(expected.compared, again.compared)]
    told = [f"{path}: {how}" for path, how in differences(expected.compared, found.compared)
            if not any(path == known or path.startswith((f"{known}.", f"{known}[")) for known in unstable)]
    return f"{'; '.join(told[:3])}, before {expected.compared}, now {found.compared}" if told else ""
