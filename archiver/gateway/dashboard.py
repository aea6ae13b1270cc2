"""The data of the live page, collected every two seconds for as long as the gateway runs."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from early_exit.archiver.control import VersionStatus
from early_exit.archiver.gateway.latency import Latencies
from early_exit.archiver.gateway.upstream import Upstream
from early_exit.archiver.version_metrics import NO_VERSION, VersionMetrics
from early_exit.handler.errors import EarlyExitError
from early_exit.training.credentials import without_credentials

EVERY_S = 2.0
SHOWN_S = 600.0
"""The page shows the looks of the last ten minutes."""
_LOOKS = int(SHOWN_S / EVERY_S)
"""The number of looks that are kept of each model. Looks are at least `EVERY_S` apart, so these cover all that is
shown."""
_EVENTS = 40

Decisions = Callable[[str], Sequence[Mapping[str, Any]]]
"""Returns the decisions about a model of `ee-watch` and `ee-exits`: objects with 'time', 'event' and evidence, oldest
first."""
Plans = Callable[[str], dict[str, Any] | None]
"""Returns what the page shows of the plan in an archive of the model store, by file name; None if there is no plan."""


@dataclass
class History:
    """The history of one model since the gateway started."""

    looks: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_LOOKS))
    metrics: Mapping[str, VersionMetrics] | None = None
    """Metrics of the last look, by version."""
    versions: list[dict[str, Any]] = field(default_factory=list)
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_EVENTS))
    decisions: list[dict[str, Any]] = field(default_factory=list)
    latencies: Latencies = field(default_factory=Latencies)
    looked_at: float | None = None
    trouble: str | None = None
    """Why the last look at this model failed."""


class Live:
    """Collects what TorchServe reports about its models."""

    def __init__(self, upstream: Upstream, plans: Plans = lambda file_name: None,
                 decisions: Decisions = lambda model: []) -> None:
        """Begin with an empty history.

        Args:
            upstream: the server to look at.
            plans: returns what the page shows of an archive's plan.
            decisions: returns the decisions of a model's watcher and operator.
        """
        self._upstream, self._plans, self._decisions = upstream, plans, decisions
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
        """Look once at all models; the state tells what failed: the look at one model, or at all of them."""
        try:
            models = await self._upstream.models()
            scrape = await self._upstream.metrics()
            self._trouble = None
        except Exception as error:  # one failed look must not end the loop
            self._trouble = _in_a_sentence(error)
            return
        for model in models:
            history = self._histories[model]
            try:
                await self._look_at(model, history, scrape.get(model, {}))
                history.trouble = None
            except Exception as error:  # one failed look must not hide the other models
                history.trouble = _in_a_sentence(error)
        self._models, self._looked_at = models, time.time()

    def seen(self, model: str, message: Mapping[str, Any]) -> None:
        """Note an answer that went through the gateway."""
        if model in self._models:
            self._histories[model].latencies.add(message)

    def state(self, model: str | None) -> dict[str, Any]:
        """Return everything that the page shows of a model; by default of the first one with exits or records."""
        ours = [name for name in self._models
                if any(version.answers for version in (self._histories[name].metrics or {}).values())]
        name = model if model in self._models else next(iter([*ours, *self._models]), None)
        now = time.time()
        state = {"time": now, "every_s": EVERY_S, "models": self._models, "model": name}
        if name is None:
            return {**state, "looked_at": self._looked_at, "trouble": self._trouble}
        history = self._histories[name]
        return {**state, "looked_at": history.looked_at, "trouble": self._trouble or history.trouble,
                **self._shown(history, now)}

    def _shown(self, history: History, now: float) -> dict[str, Any]:
        return {"versions": history.versions, "latency": history.latencies.distributions(),
                "looks": [look for look in history.looks if look["time"] > now - SHOWN_S],
                "events": sorted([*history.events, *history.decisions], key=lambda event: event["time"])[-_EVENTS:]}

    async def _look_at(self, model: str, history: History, metrics: Mapping[str, VersionMetrics]) -> None:
        versions = await self._upstream.versions(model)
        plans = [await asyncio.to_thread(self._plans, version.file_name) for version in versions]
        decisions = (await asyncio.to_thread(self._decisions, model))[-_EVENTS:]
        history.decisions = [{"time": decision["time"], "text": in_words(decision)} for decision in decisions]
        self._note(history, versions, plans, metrics)

    def _note(self, history: History, registered: Sequence[VersionStatus], plans: Sequence[dict[str, Any] | None],
              metrics: Mapping[str, VersionMetrics]) -> None:
        now, before = time.time(), history.metrics
        grown = {name: counts.since((before or {}).get(name, VersionMetrics())) for name, counts in metrics.items()}
        versions = [_version(status, plan, metrics.get(status.version, VersionMetrics()))
                    for status, plan in zip(registered, plans)]
        served = next((version["version"] for version in versions if version["serves"]), NO_VERSION)
        history.events += ({"time": now, "text": text} for text in changes(history.versions, versions))
        if before is not None:  # counts from before the first look have no time
            history.looks.append({
                "time": now, "versions": {version["version"]: _stage(version) for version in versions},
                "answers": {name: counts.answers for name, counts in grown.items() if any(counts.answers.values())},
                "shadow": {name: counts.shadow for name, counts in grown.items() if counts.shadow},
                "anytime": {name: counts.anytime for name, counts in grown.items() if counts.anytime},
                # Requests that named no version were answered by the one that serves.
                "took": {served if name == NO_VERSION else name: [counts.requests, counts.seconds]
                         for name, counts in grown.items() if counts.requests}})
        history.metrics, history.versions, history.looked_at = metrics, versions, now


def _in_a_sentence(error: Exception) -> str:
    return without_credentials(str(error) if isinstance(error, EarlyExitError) else (
        f"The gateway cannot read TorchServe's answer: {type(error).__name__}: {error}"))


def in_words(decision: Mapping[str, Any]) -> str:
    """Return a decision of a watcher or an operator as a line of the page.

    >>> in_words({"time": 0.0, "event": "rolled", "version": "4.0", "replaces": "3.0", "why": "it is cheaper"})
    'ee-watch: rolled 4.0 instead of 3.0 (it is cheaper)'
    >>> in_words({"time": 0.0, "event": "exits off", "command": "ee-exits", "by": "ann"})
    'ee-exits: exits off (by ann)'
    """
    version, replaced = decision.get("version"), decision.get("replaces")
    why = decision.get("error") or decision.get("why") or decision.get("reason")
    if why is None and "by" in decision:
        why = f"by {decision['by']}"
    return (f"{decision.get('command', 'ee-watch')}: {decision['event']}" + (f" {version}" if version else "")
            + (f" instead of {replaced}" if replaced else "") + (f" ({why})" if why else ""))


def _version(status: VersionStatus, plan: dict[str, Any] | None, metrics: VersionMetrics) -> dict[str, Any]:
    return {"version": status.version, "serves": status.is_default, "plan": plan, "workers": status.n_ready,
            "monitor": metrics.monitor or None, "bypassed": sorted(metrics.bypassed), "switched": metrics.switched}


def _stage(version: Mapping[str, Any]) -> str:
    return "serves" if version["serves"] else "ready" if version["workers"] else "starting"


def changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the events of a model's versions between two looks."""
    had, has = ({version["version"]: version for version in versions} for versions in (before, now))
    served = next((version["version"] for version in before if version["serves"]), None)
    events = []
    for name, version in has.items():
        if version["serves"] and name != served:
            events.append(f"version {name} serves" + (f" instead of {served}" if served else ""))
        elif name not in had:
            events.append(f"version {name} is being loaded")
        elif version["workers"] and not had[name]["workers"]:
            events.append(f"version {name} is ready")
        monitor, monitor_before = ((versions.get(name) or {}).get("monitor") or {} for versions in (has, had))
        if (level := monitor.get("step", 0.0)) > monitor_before.get("step", 0.0):
            # At the first look, nobody knows when the alarm came.
            events.append(f"alarm: version {name} has gone to fallback level {level:.0f}" if had else
                          f"version {name} is at fallback level {level:.0f} because of an earlier alarm")
    return events + [f"version {name} is removed" for name in had.keys() - has.keys()]
