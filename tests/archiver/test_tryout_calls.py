"""What the calls of a user's model show to `ee-archive` when it runs a handler, and what may disturb them."""

from __future__ import annotations

from pathlib import Path

import pytest

from early_exit.handler.errors import EarlyExitError, Unsupported
from tests.archiver.test_tryout import HANDLER, PLAIN, archived, samples

__all__ = ["samples"]


@pytest.mark.parametrize(("inference", "message", "why"), [
    ("self._with_scale(x)", r"changes its model while it answers \(head.scale", Unsupported.CHANGES),
    ("self._with_other_weights(x)", r"changes its model while it answers \(head.weight", Unsupported.CHANGES),
    ("torch.stack([self.model(row) for row in x])", r"without a batch dimension: .*\(4,\).* gives \(3,\)", None),
])
def test_what_only_the_calls_of_the_model_show_is_refused(
        tmp_path: Path, samples: list[Path], inference: str, message: str, why: Unsupported | None) -> None:
    handler = HANDLER.format(initialize="", postprocess=PLAIN).replace("return self.model(x)", f"return {inference}")
    with pytest.raises(EarlyExitError, match=message) as refused:
        archived(tmp_path, handler + """
    def _with_scale(self, x):
        self.model.head.scale = float(x[0, 0])
        scores = self.model(x)
        self.model.head.scale = 1.0
        return scores

    def _with_other_weights(self, x):
        self.model.head.weight.data.mul_(1.01)
        return self.model(x)
""", samples)
    assert refused.value.unsupported is why


def test_a_model_that_squeezes_a_batch_of_one_has_a_batch_dimension(tmp_path: Path, samples: list[Path]) -> None:
    handler = HANDLER.format(initialize="        self.model = squeezing(self.model).eval()", postprocess=PLAIN)
    made = archived(tmp_path, handler.replace("return self.model(x)", "return self.model(x).reshape(len(x), -1)") + """

def squeezing(net):
    class Squeezing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).squeeze()

    return Squeezing()
""", samples)
    assert made["handler"]["rows_per_request"] == 1


@pytest.mark.parametrize("function", ["topk(2)", "sort(dim=1)"])
def test_scores_in_the_order_of_their_size_are_refused(tmp_path: Path, samples: list[Path], function: str) -> None:
    handler = HANDLER.format(initialize="        self.model = sorting(self.model).eval()", postprocess=PLAIN)
    with pytest.raises(EarlyExitError, match="in the order of their size") as refused:
        archived(tmp_path, handler.replace("return self.model(x)", "return self.model(x)[0]") + f"""

def sorting(net):
    class Sorting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).softmax(1).{function}

    return Sorting()
""", samples)
    assert refused.value.unsupported is Unsupported.SEVERAL_SCORES


def test_threads_that_call_the_model_all_the_time_are_in_nobodys_way(tmp_path: Path, samples: list[Path]) -> None:
    made = archived(tmp_path, HANDLER.format(initialize="        self.keep_warm()", postprocess=PLAIN) + """
    def keep_warm(self):
        import threading

        def beat():
            while True:
                time.sleep(0.0005)
                with torch.no_grad():
                    self.model(torch.zeros(1, 4))

        for _ in range(2):
            threading.Thread(target=beat).start()
""", samples)
    assert made["handler"]["model"] == [{"root": "handler", "steps": [["attribute", "model"]]}]


def test_a_model_that_the_handler_compiles_is_taken(tmp_path: Path, samples: list[Path]) -> None:
    compiles = '        self.model = torch.compile(self.model, backend="eager")'
    made = archived(tmp_path, HANDLER.format(initialize=compiles, postprocess=PLAIN), samples)
    assert made["handler"]["model"] == [{"root": "handler", "steps": [["attribute", "model"]]}]
