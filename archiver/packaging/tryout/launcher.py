"""Forks a process for each try-out, so that the packages that all of them need are imported once.

Usage: launcher.py, with a JSON object on a line of standard input for each process: program, arguments, environment,
output and errors (files). It answers with a line when the process has begun, and with a line with its exit status when
the process has ended. It ends when the process that started it ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import runpy
import select
import signal
import sys
from typing import Any

_IMPORTED = ("torch", "torch.export.pt2_archive", "torch._dynamo", "torchvision", "ts.model_loader", "ts.service",
             "ts.torch_handler.base_handler", "captum.attr")
"""Only packages of third parties: an archive's own code must be imported from the archive."""
_TICK_S = 0.02


def main() -> None:
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a process with CUDA's state in it could not be forked
    sys.modules["openvino.torch"] = None  # type: ignore[assignment]  # a compiler that TorchServe imports if it can
    logging.getLogger("ts.torch_handler").setLevel(logging.ERROR)  # it warns about every backend that is missing
    for name in _IMPORTED:
        with contextlib.suppress(ImportError):  # some are extras; if others are missing, their users fail
            importlib.import_module(name)
    while line := sys.stdin.readline():
        request = json.loads(line)
        process = os.fork()
        if not process:
            _run(request)
        print(json.dumps({"process": process}), flush=True)
        print(json.dumps({"status": _status_of(process)}), flush=True)


def _status_of(process: int) -> int:
    """Wait for a process and return its exit status; if our parent has gone, kill the process and end this one."""
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if select.select([sys.stdin], [], [], _TICK_S)[0]:  # no request comes meanwhile, so stdin was closed
            os.killpg(process, signal.SIGKILL)
            sys.exit()


def _run(request: dict[str, Any]) -> None:
    """Run the program in this process, and end it."""
    os.setsid()  # processes that it starts are killed with it
    for number, (name, mode) in enumerate(((os.devnull, os.O_RDONLY), (request["output"], os.O_WRONLY | os.O_CREAT),
                                           (request["errors"], os.O_WRONLY | os.O_CREAT))):
        os.dup2(os.open(name, mode, 0o600), number)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["program"], *request["arguments"]]
    status = 1
    try:
        runpy.run_path(request["program"], run_name="__main__")
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
