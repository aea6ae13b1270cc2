"""A TorchServe with the settings that early exits need, as a context manager."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from xml.sax.saxutils import escape

import httpx
import psutil

from early_exit.archiver.torchserve.addresses import Addresses, free_ports
from early_exit.archiver.torchserve.metrics_file import complete_metrics_file
from early_exit.archiver.torchserve.programs import find_java, require_kill
from early_exit.archiver.torchserve.server_config import (
    CONFIG_VARIABLE,
    METRICS_FILE,
    Decided,
    as_properties,
    class_path,
    merged,
    read_config,
    vm_arguments,
)
from early_exit.archiver.torchserve.tokens import KEY_FILE, SECRET_FILE, read_token
from early_exit.handler.allocator import ALLOCATOR
from early_exit.handler.errors import ServerError
from early_exit.handler.exits.switch import SWITCHES_FOLDER, SWITCHES_VARIABLE
from early_exit.handler.files.private import open_private, private_folder, replacing
from early_exit.handler.protocol import RECORDS_VARIABLE, SECRET_VARIABLE
from early_exit.training.environment import GATEWAY_TOKEN

# Idle threads of one worker must not spin on cores that another worker needs.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}


def default_threads() -> int:
    """Return the number of threads of one worker: half the cores, because a parallel step waits for its slowest thread
    and the server needs cores, too. On two cores, one thread answered more requests than two."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


_STOP_S = 30.0


class TorchServe:
    """One server and everything it needs in one state folder.

    The folder holds config.properties, the token file (key_file.json), the secret of the workers, the switches of the
    exits, logs and the server's temporary files.
    """

    def __init__(self, model_store: Path, state: Path, addresses: Addresses, *, records: Path | None = None,
                 models: Sequence[str] = (), token_minutes: int | None = None, threads: int | None = None,
                 config: Path | None = None, log: Callable[[str], None] = lambda line: None) -> None:
        """Describe the server; entering the context starts it.

        Args:
            model_store: the folder of .mar files; archives may be loaded from nowhere else.
            state: the state folder; it is created, private to the user.
            addresses: the addresses on which the server listens.
            records: the folder into which handlers record unless their configuration names another one.
            models: the .mar file names to load at the start.
            token_minutes: how long TorchServe's tokens are valid; by default as the configuration says, or an hour.
            threads: the threads of one worker; by default OMP_NUM_THREADS, or `default_threads()`.
            config: a config.properties with further settings. With it, TorchServe also keeps its snapshots, among the
                logs.
            log: receives a line for each setting in the configuration that is ignored.

        Raises:
            ConfigError: the configuration cannot be read.
        """
        self.model_store, self.state = model_store.resolve(), state.resolve()
        self.addresses = addresses
        self.key_file = self.state / KEY_FILE
        self.secret_file = self.state / SECRET_FILE
        self.switches = Path(os.environ.get(SWITCHES_VARIABLE, "").strip() or self.state / SWITCHES_FOLDER).resolve()
        self._records = records.resolve() if records else None
        self._models = list(models)
        self._token_minutes, self._config, self._log = token_minutes, config, log
        self._users, self._settings = read_config(config), dict[str, str]()
        self._threads = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TorchServe:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.stop()

    @property
    def grpc_addresses(self) -> dict[str, str]:
        """The gRPC addresses, "inference" and "management"; they are known once the server is started."""
        return {kind: f"{self._settings[f'grpc_{kind}_address']}:{self._settings[f'grpc_{kind}_port']}"
                for kind in ("inference", "management")}

    def wait(self) -> int:
        """Wait until the server ends by itself; return its exit status."""
        assert self._process is not None
        return self._process.wait()

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes."""
        if self._process is None or self._process.poll() is not None:
            return []
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:  # it has just ended
            return []

    def stop(self) -> None:
        """End the server and its workers, if the server runs."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        # The server has a session of its own: all processes left in it, workers included, end now.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for file in (self.key_file, self.secret_file):  # they are of no use without the server
            file.unlink(missing_ok=True)
        self._process = None

    def _start(self) -> None:
        if not self.model_store.is_dir():
            raise ServerError(f"no model store at {self.model_store}: create the folder or pass --model-store")
        require_kill()
        for folder in (self.state, self.state / "logs", self.state / "tmp", self.switches):
            private_folder(folder)
        self._settings = self._configured()
        self._require_free_ports()
        self.key_file.unlink(missing_ok=True)  # TorchServe would write through a link
        for name, text in (("config.properties", as_properties(self._settings)),
                           ("log4j2.xml", _log_configuration(self.state / "logs"))):
            with replacing(self.state / name) as scratch:
                scratch.write_text(text)
        environment = {**ALLOCATOR, **THREADS, "OMP_NUM_THREADS": str(default_threads()), **os.environ, **self._threads,
                       "LOG_LOCATION": str(self.state / "logs"), "METRICS_LOCATION": str(self.state / "logs"),
                       SECRET_VARIABLE: self._make_secret(), SWITCHES_VARIABLE: str(self.switches)}
        environment.pop(CONFIG_VARIABLE, None)  # TorchServe would prefer it to ours
        environment.pop(GATEWAY_TOKEN, None)  # both may be started from one shell
        if self._records is not None:
            if not self._records.is_dir():  # an existing one may be a volume with another owner
                private_folder(self._records)
            environment[RECORDS_VARIABLE] = str(self._records)
        with open_private(self.state / "logs" / "server.out", "wb") as output:
            # The server gets a session of its own: Ctrl-C reaches only this process, which ends the server in order.
            self._process = subprocess.Popen(self._command(), cwd=self.state, env=environment, stdout=output,
                                             stderr=subprocess.STDOUT, start_new_session=True)
        self._wait_until_healthy(60.0)

    def _make_secret(self) -> str:
        """Return the secret of the workers, from the environment if it has one, and write it into its file."""
        secret = os.environ.get(SECRET_VARIABLE, "").strip() or secrets.token_hex(24)
        self.secret_file.unlink(missing_ok=True)
        # The file is new and private from the beginning; a link of this name is not followed.
        with os.fdopen(os.open(self.secret_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret + "\n")
        return secret

    def _command(self) -> list[str]:
        import ts

        home = Path(ts.__file__).parent
        ours = {"model_server_home": str(home.parent), "java.io.tmpdir": str(self.state / "tmp"),
                "log4j.configurationFile": f"file://{self.state / 'log4j2.xml'}"}
        command = [
            find_java(), *vm_arguments(self._users, ours, self._config, self._log),
            "-cp", class_path(self._users, str(home / "frontend" / "*")), "org.pytorch.serve.ModelServer",
            "--python", sys.executable, "-f", "config.properties", "-s", str(self.model_store),
            *([] if self._config else ["-ncs"]),
        ]
        return [*command, "-m", *self._models] if self._models else command

    def _configured(self) -> dict[str, str]:
        """Return TorchServe's settings: the user's, except for those that we must decide."""
        store, metrics = "the model store, the only source of archives", "the metrics of early exits"
        decided = {
            "inference_address": Decided(self.addresses.inference, "--host and --port"),
            "management_address": Decided(self.addresses.management, "--management-host and --port"),
            "metrics_address": Decided(self.addresses.metrics, "--metrics-host and --port"),
            "model_store": Decided(str(self.model_store), "--model-store"),
            # TorchServe refuses "..", and then decodes "%2e%2e".
            "allowed_urls": Decided(f"file://{re.escape(str(self.model_store))}/[^%]*", store),
            "use_env_allowed_urls": Decided("false", store),
            # Rolls register and unregister versions, which needs the management token.
            "enable_model_api": Decided("true", "rolls"),
            "disable_token_authorization": Decided("false", "the tokens of ee-serve"),
            "enable_metrics_api": Decided("true", metrics), "metrics_mode": Decided("prometheus", metrics),
            "model_metrics_auto_detect": Decided("true", metrics),
            "python": Decided(sys.executable, "the packages of ee-serve")}
        if self._token_minutes is not None:
            decided["token_expiration_min"] = Decided(str(self._token_minutes), "--token-minutes")
        if self._models:  # TorchServe would load either of these instead
            models = "the archives that ee-serve was given"
            decided |= {"load_models": Decided(",".join(self._models), models), "model_snapshot": Decided(None, models)}
        grpc = free_ports(2)
        settings = {
            "grpc_inference_address": "127.0.0.1", "grpc_management_address": "127.0.0.1",
            "grpc_inference_port": str(grpc[0]), "grpc_management_port": str(grpc[1]),
            "install_py_dep_per_model": "false", "default_workers_per_model": "1", "token_expiration_min": "60",
            **merged(self._users, decided, self._config, self._log)}
        if METRICS_FILE in settings:
            settings[METRICS_FILE] = str(complete_metrics_file(
                Path(settings[METRICS_FILE]), self.state / "metrics.yaml", self._log))
        return settings

    def _require_free_ports(self) -> None:
        http = (self.addresses.inference, self.addresses.management, self.addresses.metrics)
        for address in (*http, *self.grpc_addresses.values()):
            if not address.rpartition(":")[2].isdecimal():
                raise ServerError(f"expected a port as in 127.0.0.1:7070, found {address!r} in {self._config}")
            if _listens(address):
                raise ServerError(f"something listens on {address} already: stop it or choose another port")

    def _wait_until_healthy(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                raise ServerError(f"TorchServe ended with status {self._process.returncode}:\n{self._last_output()}")
            try:
                token = {"Authorization": f"Bearer {read_token(self.key_file, 'inference')}"}
                if httpx.get(self.addresses.inference + "/ping", headers=token, timeout=5).is_success and all(
                        map(_listens, self.grpc_addresses.values())):  # it opens these last
                    return
            except (httpx.HTTPError, ServerError):  # not listening, busy, or no tokens yet
                pass
            time.sleep(0.2)
        raise ServerError(f"TorchServe did not answer within {limit_s:.0f} s:\n{self._last_output()}")

    def _last_output(self) -> str:
        return (self.state / "logs" / "server.out").read_text(errors="replace")[-2000:]


def _listens(address: str) -> bool:
    """Tell whether somebody listens on an address."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def _log_configuration(folder: Path) -> str:
    """Return a log4j2 configuration: size-limited files with the handlers' lines, and without a line per request."""
    def appender(name: str) -> str:
        path = escape(str(folder / name))
        return (f'<RollingFile name="{name}" fileName="{path}.log" filePattern="{path}.%i.log">'
                '<PatternLayout pattern="%d{ISO8601} [%-5p] %t %c - %m%n"/>'
                '<Policies><SizeBasedTriggeringPolicy size="20 MB"/></Policies>'
                '<DefaultRolloverStrategy max="3"/></RollingFile>')

    return (
        '<?xml version="1.0" encoding="UTF-8"?><Configuration><Appenders>'
        + appender("server") + appender("model") +
        '</Appenders><Loggers>'
        '<Logger name="ACCESS_LOG" level="off"/><Logger name="TS_METRICS" level="off"/>'
        '<Logger name="MODEL_METRICS" level="off"/>'
        # A handler's lines arrive at level info, whatever their own level; the worker's line per batch is noise.
        '<Logger name="MODEL_LOG" level="info" additivity="false"><AppenderRef ref="model"/>'
        '<RegexFilter regex=".*Backend received inference.*" onMatch="DENY" onMismatch="NEUTRAL"/></Logger>'
        '<Root level="warn"><AppenderRef ref="server"/></Root></Loggers></Configuration>'
    )
