"""An extracted archive in this process, loaded and called by TorchServe's own code."""

from __future__ import annotations

import codecs
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import ts.service
from torch import Tensor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import ModelLoaderFactory

from early_exit.archiver.packaging.tryout.answers import Answer
from early_exit.archiver.packaging.tryout.child import LoadingError
from early_exit.handler.protocol import EXPLAIN_HEADER
from early_exit.handler.sample_request import SampleRequest
from early_exit.handler.user_handler.description import Root
from early_exit.handler.user_handler.places import Roots

EXPLAIN = {EXPLAIN_HEADER: "True"}
"""The header with which TorchServe tells a handler that explanations are asked for."""
_OF_HTTP = {"host": "localhost"}
"""A header that all requests over HTTP have, and no request over gRPC."""
_NEVER_ANSWERED = 10_000
"""The number of calls after which a request to an archive with early answers counts as never answered."""


class LoadedArchive:
    """A model as a worker of TorchServe has it. This process works in the model's folder from then on."""

    def __init__(self, folder: Path, envelope: str | None = None) -> None:
        """Load an extracted archive.

        Args:
            folder: the folder of the archive.
            envelope: the name of TorchServe's envelope around the handler, if there is one.

        Raises:
            LoadingError: the archive's code fails.
        """
        os.chdir(folder)
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())["model"]
        self._metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
        self._metrics.initialize_cache()
        try:
            self._service = ModelLoaderFactory.get_model_loader().load(
                manifest["modelName"], str(folder), manifest["handler"], None, 1, envelope, True, self._metrics)
        except Exception as error:  # the user's own code may raise anything
            raise LoadingError(_why(manifest["handler"], error)) from error
        self._service.set_cl_socket(None)
        self.roots = _roots(manifest["handler"], self._service._entry_point, envelope)
        """The objects at which the handler's names begin."""

    def answer(self, samples: Sequence[SampleRequest], headers: dict[str, str] | None = None, *,
               first: int = 0) -> list[Answer]:
        """Return the answers to a batch.

        Args:
            samples: the requests of the batch.
            headers: the headers of each request.
            first: the number in the id of the first request; the other ids count on from there.
        """
        waiting = {f"sample-{number}": sample for number, sample in enumerate(samples, first)}
        answers: dict[str, Answer] = {}
        for _ in range(_NEVER_ANSWERED):  # with early answers a request comes again until it is answered
            answers |= self._call({id_: sample for id_, sample in waiting.items() if id_ not in answers}, headers or {})
            if len(answers) == len(waiting):
                return [answers[id_] for id_ in waiting]
        raise LoadingError(f"a request was not answered in {_NEVER_ANSWERED} steps of its worker")

    def _call(self, waiting: dict[str, SampleRequest], headers: dict[str, str]) -> dict[str, Answer]:
        batch = [{"requestId": id_.encode(),
                  "parameters": [{"name": part.name, "contentType": part.content_type, "value": part.handed_over()}
                                 for part in sample.parts],
                  "headers": [{"name": name.encode(), "value": value.encode()}
                              for name, value in (_OF_HTTP | headers).items()]}
                 for id_, sample in waiting.items()]
        told: list[dict[str, Answer]] = []

        def create(ret: Any, ids: dict[int, str], message: str, code: int, context: Any = None, **_: Any) -> bytes:
            try:
                told.append({id_: _answer(None if ret is None else ret[index], index, message, code, context)
                             for index, id_ in ids.items()})
            except TypeError:  # TorchServe answers so if it cannot write a value
                told.append(dict.fromkeys(ids.values(), Answer(503, "", b"Unsupported model output data type.")))
            return b""

        before, ts.service.create_predict_response = ts.service.create_predict_response, create
        try:
            self._service.predict(batch)
        finally:
            ts.service.create_predict_response = before
        return told[-1]


def _why(handler: str, error: Exception) -> str:
    """Return why a handler cannot be loaded; print the traceback if the reason is in the user's code."""
    if isinstance(error, ModuleNotFoundError) and isinstance(error.__context__, ImportError) and str(
            error.name).startswith("ts.torch_handler."):
        error = error.__context__  # if a file cannot be imported, TorchServe looks for a built-in handler
    if isinstance(error, ModuleNotFoundError) and error.name == Path(handler.partition(":")[0]).stem:
        return (f"there is no handler {handler}: the file is not in the archive, and TorchServe has no built-in "
                "handler of that name")
    if isinstance(error, ModuleNotFoundError):
        return (f"{handler} needs {error.name!r}, which is not installed here: install it, and name it in the "
                "archive's requirements file")
    if isinstance(error, UnpicklingError):
        return (f"{handler} reads weights that hold more than tensors, and unpickling that could run any code, which "
                f"torch refuses: save model.state_dict() instead ({str(error).splitlines()[0]})")
    if isinstance(error, (UnicodeDecodeError, json.JSONDecodeError)) and (files := _files_in_other_encodings()):
        return (f"{handler} cannot read {', '.join(files)} ({error}): save it as UTF-8 without a byte order mark, as "
                "TorchServe's own code expects it")
    traceback.print_exc()
    return f"{handler} cannot be loaded as TorchServe loads it: {type(error).__name__}: {error}"


def _files_in_other_encodings() -> list[str]:
    """Return the text files of the archive that are not UTF-8, and JSON files with a byte order mark."""
    wrong = []
    for file in sorted(path for path in Path().iterdir() if path.suffix in (".json", ".yaml", ".yml", ".txt", ".csv")):
        content = file.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError:
            wrong.append(file.name)
        else:
            wrong += [file.name] if content.startswith(codecs.BOM_UTF8) and file.suffix == ".json" else []
    return wrong


def _roots(handler: str, entry_point: Any, envelope: str | None) -> Roots:
    if envelope is not None:
        entry_point = entry_point.__self__._handle_fn
    file, _, function = handler.partition(":")
    name = file.split("/")[-1].removesuffix(".py")
    module = sys.modules.get(name) or sys.modules[f"ts.torch_handler.{name}"]
    if hasattr(module, function or "handle"):
        return {Root.MODULE: module}
    return {Root.HANDLER: entry_point.__self__, Root.MODULE: module}


def _answer(value: Any, index: int, message: str, code: int, context: Any) -> Answer:
    if context is None:
        return Answer(code, "", message.encode())
    status, _ = context.get_response_status(index)
    return Answer(status or code, context.get_response_content_type(index) or "", _encoded(value),
                  dict(context.get_response_headers(index)))


def _encoded(value: Any) -> bytes:
    """Return the body of a response as TorchServe writes it; a tensor, which TorchServe would pickle, is written as
    JSON.

    Raises:
        TypeError: TorchServe cannot write the value.
    """
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode()
    return json.dumps(value.tolist() if isinstance(value, Tensor) else value, indent=2).encode()
