"""The monitor's sequential test: does the certificate still hold on the shadow samples?

The certificate makes two statements with the tolerance T: the expected loss is at most T over the contents, and it is
at most T over the requests. The test bets against both statements (see `betting`):

- Contents. Each bet is on one block. A block with a loss of k in n new contents gains k - T n, divided by the size that
  95 % of the earlier blocks did not exceed (or by n, if n is larger).
- Requests. Each bet is on the mean loss of a round. A round consists of whole blocks, which together have at least
  20 / T runs of samples. One scene, however long, is in one round. Samples with one content that follow each other
  directly are one run. The mean loss of a round is that of its samples or that of its runs, whichever is less, so a
  client that repeats a request raises no alarm by itself. A round of n samples with the mean loss m gains n (m - T),
  divided by the size that 95 % of the latest rounds did not exceed (or by n, if n is larger): each request counts the
  same, and not each round.

The bets on contents count each content once. Nine tenths of the capital are bet on contents, which show a change
sooner. One tenth is bet on requests, because only these bets show that a popular file is answered wrongly.

As long as the expected loss of every block and of every round, given the past, is at most T, the probability of ever
raising an alarm is at most delta, however long the test runs and however often one looks (Ville's inequality). Half of
a capital is put down at the first bet. The rest is kept and is put down later, in ever smaller parts. Without this
rest, a gambler who has lost everything in a long quiet time would notice a change late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from early_exit.handler.betting import after_round, rejects, wealth
from early_exit.handler.exits.likeness import COUNTS_FULLY
from early_exit.handler.formats import MONITOR_STATE
from early_exit.handler.monitor.blocks import Block, Blocks, Count, Sample
from early_exit.handler.monitor.monitored import Monitored

BETS = (0.02, 0.05, 0.1, 0.2, 0.4)
ON_CONTENTS, ON_REQUESTS = 0.9, 0.1
"""The shares of the capital that are bet on contents and on requests."""
_STAKE_EVERY, _STAKE_EVERY_OF_REQUESTS = 100, 10
"""The number of rounds after which more of the capital is put down."""
_LATEST_ROUNDS = 100
_SETTLED_S = 2.0
"""Samples that are newer than this may still be overtaken by older ones of another worker: each worker shares its
samples every second."""
_MOST_WAITING = 1000


@dataclass(frozen=True)
class Capital:
    """The capital of one gambler, who bets against one statement."""

    rounds: int = 0
    stakes: tuple[float, ...] = (0.0,) * len(BETS)
    """For each bet, the current value of all stakes that have been put down."""

    def after(self, gain: float, tolerance: float, stake_every: int) -> Capital:
        """Return the capital after a round with a gain in [-T, 1 - T]."""
        number, into = divmod(self.rounds, stake_every)
        put_down = 0.0 if into else 1 / ((number + 1) * (number + 2))  # these sum to 1
        bets = [bet / tolerance for bet in BETS]
        return Capital(self.rounds + 1, after_round(self.stakes, bets, gain, put_down=put_down))

    def wealth(self, stake_every: int) -> float:
        """Return the whole capital, kept and put down; it began with 1."""
        return wealth(self.stakes, kept=1 / (-(-self.rounds // stake_every) + 1))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Capital:
        """Read a capital from the JSON of a monitor's state.

        Raises:
            KeyError, TypeError: the JSON is not a capital.
        """
        return cls(data["rounds"], tuple(data["stakes"]))


@dataclass(frozen=True)
class Evidence:
    """The evidence of the shadow samples of one fallback level against the certificate.

    While the operator's switch demands a higher level, the samples of that level count, too.
    """

    n: int = 0
    """The number of samples."""
    lost: float = 0.0
    """The sum of the losses."""
    contents: Capital = field(default_factory=Capital)
    requests: Capital = field(default_factory=Capital)
    contents_all_wrong: Capital = field(default_factory=Capital)
    requests_all_wrong: Capital = field(default_factory=Capital)
    """The capitals that the same bets would have led to if all answers had been wrong."""
    round: Count = field(default_factory=Count)
    """The samples in the blocks of the open round of the bets on requests."""
    sizes: tuple[int, ...] = ()
    """The number of blocks by size: with 1 content, with 2, with 3 or 4, with 5 to 8, and so on."""
    rounds: tuple[int, ...] = ()
    """The numbers of samples in the latest rounds of the bets on requests, without the first of all."""
    blocks: Blocks = field(default_factory=Blocks)

    def after(self, sample: Sample, monitored: Monitored) -> Evidence:
        """Return the evidence after one more sample.

        >>> watched = Monitored("disagreement", 0.02, 0.05)
        >>> Evidence().after(Sample(0, 0.0), watched).wealth() < 1 < Evidence().after(Sample(0, 1.0), watched).wealth()
        True
        """
        blocks, ended = self.blocks.after(sample, monitored.likeness, monitored.n_remembered)
        found = replace(self, n=self.n + 1, lost=self.lost + sample.loss, blocks=blocks)
        for block in ended:
            found = found._bet_on_contents(block, monitored)._bet_on_requests(block, monitored)
        return found

    def wealth(self) -> float:
        """Return the whole capital, on contents and on requests; it began with 1."""
        return _wealth(self.contents, self.requests)

    def shows_wrong_answers(self, delta: float) -> bool:
        """Tell whether the bets so far would have raised an alarm if all answers had been wrong.

        >>> watched = Monitored("disagreement", 0.02, 0.05)
        >>> few = Evidence().after(Sample(0, 0.0), watched)
        >>> more = few.after(Sample(0, 0.0), watched).after(Sample(0, 0.0), watched)
        >>> few.shows_wrong_answers(0.05), more.shows_wrong_answers(0.05)
        (False, True)
        """
        return rejects(_wealth(self.contents_all_wrong, self.requests_all_wrong), delta)

    @property
    def n_tested(self) -> int:
        """A lower bound on the number of contents that were bet on as new ones; more than half of their number."""
        # States of the previous release have no sizes; in them, each bet was on one sample.
        smallest = [(1 << number) // 2 + 1 for number in range(len(self.sizes))]
        return max(self.contents.rounds, sum(size * count for size, count in zip(smallest, self.sizes)))

    def _bet_on_contents(self, block: Block, monitored: Monitored) -> Evidence:
        if not block.n_new:
            return self
        # `_largest` depends only on the earlier blocks, because a bet must be fixed before its round.
        size = max(block.n_new, self._largest())
        gain, most = ((lost - monitored.tolerance * block.n_new) / size for lost in (block.lost_new, block.n_new))
        number = (block.n_new - 1).bit_length()
        sizes = [*self.sizes, *[0] * (number + 1 - len(self.sizes))]
        sizes[number] += 1
        found = replace(self, contents=self.contents.after(gain, monitored.tolerance, _STAKE_EVERY), sizes=tuple(sizes))
        if self.shows_wrong_answers(monitored.delta):  # more rounds tell nothing new, and the capital would overflow
            return found
        return replace(found, contents_all_wrong=self.contents_all_wrong.after(most, monitored.tolerance, _STAKE_EVERY))

    def _bet_on_requests(self, block: Block, monitored: Monitored) -> Evidence:
        count = self.round + block.count
        if count.n_runs < monitored.samples_per_round:
            return replace(self, round=count)
        # The size depends only on the earlier rounds, because a bet must be fixed before its round.
        usual = sorted(self.rounds)[math.ceil(COUNTS_FULLY * len(self.rounds)) - 1] if self.rounds else 0
        weight = count.n / max(count.n, usual)
        requests, all_wrong = (
            before.after(weight * (loss - monitored.tolerance), monitored.tolerance, _STAKE_EVERY_OF_REQUESTS)
            for before, loss in ((self.requests, count.mean_loss()), (self.requests_all_wrong, 1.0)))
        shows = self.shows_wrong_answers(monitored.delta)
        # The first round may be longer than others, because all contents are new when its first block begins.
        rounds = (*self.rounds, count.n)[-_LATEST_ROUNDS:] if self.requests.rounds else ()
        return replace(self, requests=requests, round=Count(), rounds=rounds,
                       requests_all_wrong=self.requests_all_wrong if shows else all_wrong)

    def _largest(self) -> int:
        """Return the smallest power of two that the size of 95 % of the blocks so far does not exceed."""
        total, sum_so_far = sum(self.sizes), 0
        for number, count in enumerate(self.sizes):
            sum_so_far += count
            if sum_so_far >= COUNTS_FULLY * total:
                return 1 << number
        return 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evidence:
        """Read the output of `to_json`, or the state of the previous release, which had one capital for samples."""
        if "capital" in data:
            return cls(int(data["n"]), float(data["lost"]), Capital(int(data["n"]), tuple(data["capital"])))
        contents, requests = (Capital.from_json(data[name]) for name in ("contents", "requests"))
        # Version 0.2.0 did not store what all wrong answers would have led to.
        contents_all_wrong, requests_all_wrong = (Capital.from_json(data[name]) if name in data else Capital()
                                                  for name in ("contents_all_wrong", "requests_all_wrong"))
        # Version 0.2.0 stored a number and a loss, of samples that did not repeat the one before.
        in_round = Count(**data["round"]) if "round" in data else Count(
            data["round_n"], data["round_n"], data["round_lost"], data["round_lost"])
        return cls(int(data["n"]), float(data["lost"]), contents, requests, contents_all_wrong,
                   requests_all_wrong, in_round, tuple(data["sizes"]), tuple(data.get("rounds", ())),
                   Blocks.from_json(data["blocks"]))


@dataclass(frozen=True)
class Alarm:
    """Why a fallback level was left."""

    step: int
    """The fallback level that was left: that of the sample that raised the alarm. The name is that of the field in
    state files."""
    time: float
    """Unix time in seconds."""
    n: int
    """The number of shadow samples that were answered at that level."""
    mean_loss: float
    wealth: float


@dataclass(frozen=True)
class MonitorState:
    """The fallback level of a version and the evidence at that level. Each level begins with fresh evidence."""

    step: int = 0
    """The fallback level. Level 0 is the plan as deployed, the other levels of the plan follow in order, and the last
    level has no exits. The name is that of the field in state files."""
    evidence: Evidence = field(default_factory=Evidence)
    alarms: tuple[Alarm, ...] = ()
    """The alarms, at most one for each fallback level. The first alarm voids the certificate. If a worker could not
    read the state, there is one for level 0 that no sample has raised, and none for the other levels."""

    waiting: tuple[Sample, ...] = ()
    """Samples that are too new for their order to be certain. Only blocks depend on the order, so this is empty if each
    sample is a block of its own."""
    origin: str = ""
    """The name of the file that the state was first written to, which its copies in other folders keep. It is empty in
    memory and in states of earlier versions."""

    def after(self, samples: Iterable[Sample], monitored: Monitored, last_level: int, now: float) -> MonitorState:
        """Return the state after some samples.

        Samples of lower levels are ignored, because those levels have been left. Samples of higher levels come from
        batches for which the operator's switch demanded such a level. They count, because exits answered them, too;
        only those of the last level, which has no exits, are ignored.
        """
        level, evidence, alarms = self.step, self.evidence, self.alarms
        settled, waiting = _settled((*self.waiting, *samples), monitored, now)
        for sample in settled:
            if not level <= sample.level < last_level:
                continue
            evidence = evidence.after(sample, monitored)
            if rejects(evidence.wealth(), monitored.delta):
                alarms = (*alarms, Alarm(sample.level, now, evidence.n, evidence.lost / evidence.n, evidence.wealth()))
                level, evidence = sample.level + 1, Evidence()
        return replace(self, step=level, evidence=evidence, alarms=alarms, waiting=tuple(waiting))

    def to_json(self) -> dict[str, Any]:
        return MONITOR_STATE.stamped({"certificate": "void" if self.step else "holds", **asdict(self)})

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str) -> MonitorState:
        """Read a monitor's state.

        Raises:
            FormatError: this version does not read its format.
            ValueError: the data is not a monitor's state.
        """
        MONITOR_STATE.require(data, source)
        try:
            state = cls(int(data["step"]), Evidence.from_json(data["evidence"]),
                        tuple(Alarm(**alarm) for alarm in data["alarms"]),
                        tuple(Sample.from_json(sample) for sample in data.get("waiting", ())),
                        str(data.get("origin", "")))
            if not all(map(math.isfinite, _numbers(data))):
                raise ValueError(f"expected finite numbers in the state of a monitor, found {data!r:.200}")
            return state
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"expected the state of a monitor, found {data!r:.80}") from error


def _wealth(contents: Capital, requests: Capital) -> float:
    return ON_CONTENTS * contents.wealth(_STAKE_EVERY) + ON_REQUESTS * requests.wealth(_STAKE_EVERY_OF_REQUESTS)


def _settled(samples: Sequence[Sample], monitored: Monitored, now: float) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Return the samples whose order is certain, in that order, and those that must wait."""
    if monitored.likeness is None:
        return samples, ()
    ordered = sorted(samples, key=lambda sample: sample.time)
    # Samples from the far future do not wait: they were taken before somebody set the clock back.
    waits = [abs(sample.time - now) < _SETTLED_S for sample in ordered]
    first = max(0, len(ordered) - _MOST_WAITING)
    return ([sample for place, sample in enumerate(ordered) if place < first or not waits[place]],
            [sample for place, sample in enumerate(ordered) if place >= first and waits[place]])


def _numbers(value: Any) -> Iterator[float]:
    """Yield all numbers in a piece of JSON."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
