"""What the live page shows: gathered every two seconds, for as long as the gateway runs."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from early_exit.archiver.gateway.certificates import Promises
from early_exit.archiver.gateway.latency import Latencies
from early_exit.archiver.gateway.prometheus import VersionMetrics, read_metrics
from early_exit.archiver.gateway.torchserve_client import Upstream
from early_exit.handler.errors import ServerError

EVERY_S = 2.0
SHOWN_S = 600.0
"""The page shows the looks of the last ten minutes."""
_LOOKS = int(SHOWN_S / EVERY_S)
"""Kept of each model: looks are never closer than `EVERY_S`, so no fewer than are shown."""
_EVENTS = 40
_DEFAULT = "default"

Decisions = Callable[[str], Sequence[Mapping[str, Any]]]
"""Returns what `ee-watch` decided about a model: objects with 'time', 'event' and evidence, oldest first."""


@dataclass
class History:
    """What has been seen of one model since the gateway started."""

    looks: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_LOOKS))
    metrics: Mapping[str, VersionMetrics] | None = None
    """Of the last look, by version."""
    versions: list[dict[str, Any]] = field(default_factory=list)
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_EVENTS))
    decisions: list[dict[str, Any]] = field(default_factory=list)
    latencies: Latencies = field(default_factory=Latencies)
    looked_at: float | None = None
    trouble: str | None = None
    """Why the last look at this model failed."""


class Live:
    """Remembers what TorchServe tells of its models."""

    def __init__(self, upstream: Upstream, store: Path | None, decisions: Decisions = lambda model: []) -> None:
        """Begin with nothing.

        Args:
            upstream: that is looked at.
            store: the server's model store, where plans and certificates are read from the archives.
            decisions: of the watcher of a model.
        """
        self._upstream, self._promises, self._decisions = upstream, Promises(store), decisions
        self._histories: dict[str, History] = defaultdict(History)
        self._models: list[str] = []
        self._trouble: str | None = None
        self._looked_at: float | None = None

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(EVERY_S)

    async def look(self) -> None:
        """Look once at all models; what fails is told by the state, of one model or of all."""
        try:
            models = await self._upstream.models()
            scrape = read_metrics(await self._upstream.metrics())
            self._trouble = None
        except Exception as error:  # one look that fails must not be the last
            self._trouble = _in_a_sentence(error)
            return
        for model in models:
            history = self._histories[model]
            try:
                await self._look_at(model, history, scrape.get(model, {}))
                history.trouble = None
            except Exception as error:  # nor hide the other models
                history.trouble = _in_a_sentence(error)
        self._models, self._looked_at = models, time.time()

    def seen(self, model: str, told: Mapping[str, Any]) -> None:
        """Note an answer that went through the gateway."""
        if model in self._models:
            self._histories[model].latencies.add(told)

    def state(self, model: str | None) -> dict[str, Any]:
        """Return everything the page shows of a model, by default the first that has exits or records."""
        ours = [name for name in self._models if any(one.answers for one in
                                                     (self._histories[name].metrics or {}).values())]
        name = model if model in self._models else next(iter([*ours, *self._models]), None)
        now = time.time()
        told = {"time": now, "every_s": EVERY_S, "models": self._models, "model": name}
        if name is None:
            return {**told, "looked_at": self._looked_at, "trouble": self._trouble}
        history = self._histories[name]
        return {**told, "looked_at": history.looked_at, "trouble": self._trouble or history.trouble,
                **self._of(history, now)}

    def _of(self, history: History, now: float) -> dict[str, Any]:
        return {"versions": history.versions, "latency": history.latencies.told(),
                "looks": [look for look in history.looks if look["time"] > now - SHOWN_S],
                "events": sorted([*history.events, *history.decisions], key=lambda event: event["time"])[-_EVENTS:]}

    async def _look_at(self, model: str, history: History, metrics: Mapping[str, VersionMetrics]) -> None:
        versions = await self._upstream.versions(model)
        plans = [await asyncio.to_thread(self._promises.of, one["modelUrl"]) for one in versions]
        decisions = await asyncio.to_thread(self._decisions, model)
        history.decisions = [{"time": one["time"], "text": in_words(one)} for one in decisions[-_EVENTS:]]
        self._note(history, versions, plans, metrics)

    def _note(self, history: History, versions: Sequence[Mapping[str, Any]], plans: Sequence[dict[str, Any] | None],
              metrics: Mapping[str, VersionMetrics]) -> None:
        now, before = time.time(), history.metrics
        grown = {version: one.since((before or {}).get(version, VersionMetrics())) for version, one in metrics.items()}
        told = [_version(one, plan, metrics.get(one["modelVersion"], VersionMetrics()))
                for one, plan in zip(versions, plans)]
        served = next((one["version"] for one in told if one["serves"]), _DEFAULT)
        history.events += ({"time": now, "text": text} for text in changes(history.versions, told))
        if before is not None:  # what was counted before the first look has no time
            history.looks.append({
                "time": now, "versions": {one["version"]: _standing(one) for one in told},
                "answers": {version: one.answers for version, one in grown.items() if any(one.answers.values())},
                "shadow": {version: one.shadow for version, one in grown.items() if one.shadow},
                "anytime": {version: one.anytime for version, one in grown.items() if one.anytime},
                # TorchServe counts requests that name no version under the name 'default'.
                "took": {served if version == _DEFAULT else version: [one.requests, one.seconds]
                         for version, one in grown.items() if one.requests}})
        history.metrics, history.versions, history.looked_at = metrics, told, now


def _in_a_sentence(error: Exception) -> str:
    return str(error) if isinstance(error, ServerError) else (
        f"The gateway cannot read what TorchServe tells: {type(error).__name__}: {error}")


def in_words(decision: Mapping[str, Any]) -> str:
    """Return a watcher's decision as a line of the page.

    >>> in_words({"time": 0.0, "event": "rolled", "version": "4.0", "replaces": "3.0", "why": "it is cheaper"})
    'ee-watch: rolled 4.0 instead of 3.0 (it is cheaper)'
    """
    version, replaced = decision.get("version"), decision.get("replaces")
    why = decision.get("error") or decision.get("why") or decision.get("reason")
    return (f"ee-watch: {decision['event']}" + (f" {version}" if version else "")
            + (f" instead of {replaced}" if replaced else "") + (f" ({why})" if why else ""))


def _version(one: Mapping[str, Any], plan: dict[str, Any] | None, metrics: VersionMetrics) -> dict[str, Any]:
    return {"version": one["modelVersion"], "serves": one["isDefault"], "plan": plan,
            "workers": sum(worker["status"] == "READY" for worker in one.get("workers", [])),
            "monitor": metrics.monitor or None, "bypassed": sorted(metrics.bypassed)}


def _standing(version: Mapping[str, Any]) -> str:
    return "serves" if version["serves"] else "ready" if version["workers"] else "starting"


def changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what has happened to the versions of a model between two looks."""
    had, has = ({one["version"]: one for one in versions} for versions in (before, now))
    served = next((one["version"] for one in before if one["serves"]), None)
    told = []
    for version, one in has.items():
        if one["serves"] and version != served:
            told.append(f"version {version} serves" + (f" instead of {served}" if served else ""))
        elif version not in had:
            told.append(f"version {version} is being loaded")
        elif one["workers"] and not had[version]["workers"]:
            told.append(f"version {version} is ready")
        step, was = ((which.get(version) or {}).get("monitor") or {} for which in (has, had))
        if step.get("step", 0.0) > was.get("step", 0.0):
            told.append(f"alarm: version {version} has stepped back to a safer setting ({step['step']:.0f})")
    return told + [f"version {version} is removed" for version in had.keys() - has.keys()]
