"""The context that the user's handler sees: TorchServe's API for the calls of any host."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from early_exit.handler.call import Call, Reply

_HIDDEN = ("pt2", "early_exit")
"""Blocks of model-config.yaml that the handler does not see: "pt2" asks for torch.compile, which would specialise the
stages for every batch size that the exits produce."""


_SET_BY_TORCHSERVE = frozenset({"request_ids", "_request_processor", "cl_socket"})
"""Attributes that TorchServe sets on its context for each batch."""


class RequestState:
    """The properties of one request that a handler reads and sets, with the interface of TorchServe's
    `RequestProcessor`."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._request_headers = dict(headers)
        self._status, self._phrase = 200, ""
        self._response_headers: dict[str, str] = {}

    def get_request_property(self, key: str) -> Any:
        return self._request_headers.get(key)

    def get_request_properties(self) -> dict[str, str]:
        return self._request_headers

    def report_status(self, code: int, reason_phrase: str | None = None) -> None:
        self._status, self._phrase = code, reason_phrase or ""

    def get_response_status_code(self) -> int:
        return self._status

    def get_response_status_phrase(self) -> str:
        return self._phrase

    def add_response_property(self, key: str, value: str) -> None:
        self._response_headers[key] = value

    def get_response_headers(self) -> dict[str, str]:
        return self._response_headers

    def get_response_header(self, key: str) -> str | None:
        return self._response_headers.get(key)


class HandlerContext:
    """The context of a worker, as the user's handler would see it in the original archive.

    It holds the archive's original manifest and configuration, and the requests of the current call. Everything else is
    read from, and set on, the context of the host.
    """

    _OWN = frozenset({"_base", "_of_host", "manifest", "model_yaml_config", "request_ids", "request_processor"})
    request_ids: dict[int, str]
    """The ids of the requests by their positions in the call."""
    request_processor: list[RequestState]
    """The properties of each request of the call, by position."""

    def __init__(self, base: Any, manifest: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Wrap the host's context, and hide the changes that `ee-archive` made to the archive.

        Args:
            base: the host's context.
            manifest: the archive's original manifest.
            config: the archive's model-config.yaml; blocks that concern our model are hidden from the handler.
        """
        self._base, self.manifest = base, manifest
        self._of_host = frozenset(vars(base)) | _SET_BY_TORCHSERVE
        self.model_yaml_config = {key: value for key, value in config.items() if key not in _HIDDEN}
        self.request_ids, self.request_processor = {}, []

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:  # not set yet, for example in a copy that is being made
            raise AttributeError(name)
        return getattr(self._base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._base, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._OWN:
            object.__delattr__(self, name)
        else:
            delattr(self._base, name)

    @property
    def _request_processor(self) -> list[RequestState]:
        return self.request_processor

    def begin(self, calls: Sequence[Call]) -> None:
        """Begin a call of the handler with these requests."""
        self.request_ids = {position: call.id for position, call in enumerate(calls)}
        self.request_processor = [RequestState(call.headers) for call in calls]

    def view(self) -> HandlerContext:
        """Return a context of the same worker for one of several calls of the handler in progress.

        Attributes that the handler sets on it are visible to that call alone.
        """
        return HandlerContext(copy.copy(self._base), self.manifest, self.model_yaml_config)

    def put_on_it(self) -> tuple[dict[str, Any], frozenset[str]]:
        """Return the attributes of the host's context, and the names of those that were not set by a handler."""
        return vars(self._base), self._of_host

    def reply(self, position: int, body: Any) -> Reply:
        """Return the reply to a request of the call, with the status and headers that were set for it."""
        state = self.request_processor[position]
        return Reply(body, state.get_response_status_code(), state.get_response_status_phrase(),
                     state.get_response_headers())

    def get_request_id(self, idx: int = 0) -> str | None:
        return self.request_ids.get(idx)

    def get_request_header(self, idx: int, key: str) -> Any:
        return self.request_processor[idx].get_request_property(key)

    def get_all_request_header(self, idx: int) -> dict[str, str]:
        return self.request_processor[idx].get_request_properties()

    def set_response_content_type(self, idx: int, value: str) -> None:
        self.set_response_header(idx, "content-type", value)

    def get_response_content_type(self, idx: int) -> str | None:
        return self.get_response_headers(idx).get("content-type")

    def get_response_status(self, idx: int) -> tuple[int, str]:
        state = self.request_processor[idx]
        return state.get_response_status_code(), state.get_response_status_phrase()

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        self.request_processor[idx].report_status(code, reason_phrase=phrase)

    def set_all_response_status(self, code: int = 200, phrase: str = "") -> None:
        for state in self.request_processor:
            state.report_status(code, reason_phrase=phrase)

    def get_response_headers(self, idx: int) -> dict[str, str]:
        return self.request_processor[idx].get_response_headers()

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        self.request_processor[idx].add_response_property(key, value)

    def get_sequence_id(self, idx: int) -> Any:
        return self.get_request_header(idx, self._base.header_key_sequence_id)


class ToolContext:
    """A context that replaces the host's, for tools that load a handler without a host, and for hosts in memory."""

    header_key_sequence_id = "ts_request_sequence_id"
    header_key_sequence_start = "ts_request_sequence_start"
    header_key_sequence_end = "ts_request_sequence_end"
    stopping_criteria = None

    def __init__(self, model_name: str, model_dir: str, *, batch_size: int = 1, gpu_id: int | None = None) -> None:
        self.model_name = model_name
        self.metrics: Any = NoMetrics()
        self.system_properties = {"model_dir": model_dir, "gpu_id": gpu_id, "batch_size": batch_size,
                                  "server_name": "MMS", "server_version": "0.12.0", "limit_max_image_pixels": True}


class NoMetrics:
    """Accepts all metrics of a handler and ignores them."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self
