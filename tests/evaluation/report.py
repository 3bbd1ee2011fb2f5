"""What detection and diagnosis reach on the recorded runs, as tables."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median

from evaluation.peers import PEERS
from evaluation.recording import load, path_of
from evaluation.replay import Ablation, Outcome, replay
from evaluation.suite import RUNS
from evaluation.training import Half, Run

LEDGER = Path("tests/evaluation/ledger.jsonl")
ABLATIONS = {"all": Ablation(), "without the loss": Ablation(loss=False), "without the probe": Ablation(probe=False)}
FOUND, STRICT, MEDIAN, P90, ALERTS = 0.98, 0.90, 5, 25, 1.1
"""What the development half has to reach, beside no false alarm."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One line of the table."""

    sick: int
    found: int
    healthy: int
    false: int
    kind: int
    strict: int
    acceptable: int
    median: float
    p90: float
    alerts: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Figures:
        sick = [outcome for outcome in outcomes if outcome.run.is_sick]
        found = [outcome for outcome in sick if outcome.first is not None]
        waited = sorted(outcome.latency for outcome in found if outcome.latency is not None)
        said = [len(outcome.alerts) - len(outcome.early) for outcome in found]
        return cls(
            sick=len(sick),
            found=len(found),
            healthy=len(outcomes) - len(sick),
            false=sum(bool(outcome.early) for outcome in outcomes),
            kind=sum(outcome.kind_is_right for outcome in found),
            strict=sum(outcome.cause_is_strict for outcome in found),
            acceptable=sum(outcome.cause_is_acceptable for outcome in found),
            median=median(waited) if waited else float("nan"),
            p90=waited[min(len(waited) - 1, int(0.9 * len(waited)))] if waited else float("nan"),
            alerts=sum(said) / max(len(said), 1),
        )

    def line(self, label: str) -> str:
        low, high = wilson(self.false, self.sick + self.healthy)
        return (
            f"| {label} | {share(self.found, self.sick)} | {self.false} of {self.sick + self.healthy} "
            f"({100 * low:.1f}-{100 * high:.1f} %) | {share(self.kind, self.found)} | {share(self.strict, self.found)} "
            f"| {share(self.acceptable, self.found)} | {self.median:g} / {self.p90:g} | {self.alerts:.2f} |"
        )

    @property
    def is_reached(self) -> bool:
        return (
            self.false == 0
            and self.found >= FOUND * self.sick
            and self.strict >= STRICT * self.found
            and self.median <= MEDIAN
            and self.p90 <= P90
            and self.alerts <= ALERTS
        )


HEADER = (
    "| | found | false alarms (95 %) | kind right | cause right, strict | acceptable "
    "| steps to the alert, median / 90 % | alerts a sick run |\n|---|---|---|---|---|---|---|---|"
)


def share(part: int, whole: int) -> str:
    return f"{part}/{whole} = {100 * part / max(whole, 1):.1f} %"


def wilson(part: int, whole: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    if not whole:
        return 0.0, 1.0
    rate = part / whole
    middle = (rate + z * z / (2 * whole)) / (1 + z * z / whole)
    spread = z / (1 + z * z / whole) * (rate * (1 - rate) / whole + z * z / (4 * whole * whole)) ** 0.5
    return max(0.0, middle - spread), min(1.0, middle + spread)


def evaluate(seeds: Iterable[int], only: Sequence[str] = (), *, verbose: bool = False) -> int:
    """Print the development half; 1 if one of its figures is missed."""
    runs = [run for run in RUNS.values() if (run.name in only if only else run.half == "development")]
    seeds = list(seeds)
    outcomes = {label: _replayed(runs, seeds, ablation) for label, ablation in ABLATIONS.items()}
    _explain(outcomes["all"], verbose=verbose)
    print(f"\nDevelopment half, {len(runs)} kinds of runs, seeds {seeds[0]} to {seeds[-1]}\n\n{HEADER}")
    figures = {label: Figures.of(found) for label, found in outcomes.items()}
    for label, line in figures.items():
        print(line.line(label))
    for label in list(ABLATIONS)[1:]:
        for outcome in outcomes[label]:
            for alert in outcome.early:
                print(f"FALSE {label}: {outcome.run.name}/{outcome.seed} {alert.symptom}@{alert.step} {alert.message}")
    _print_kinds(outcomes["all"])
    _print_peers(runs, seeds)
    silent = all(line.false == 0 for line in figures.values())
    return 0 if figures["all"].is_reached and silent else 1


def evaluate_test(seeds: Iterable[int]) -> int:
    """Replay the test half and append what it gave to the ledger."""
    seeds = list(seeds)
    runs = _half("test")
    print(f"Test half, {len(runs)} kinds of runs\n\n{HEADER}")
    line: dict[str, object] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "seeds": seeds,
        "kinds": len(runs),
    }
    for label, ablation in ABLATIONS.items():
        figures = Figures.of(_replayed(runs, seeds, ablation))
        print(figures.line(label))
        line[label] = vars(figures)
    with LEDGER.open("a") as ledger:
        ledger.write(json.dumps(line) + "\n")
    return 0


def _half(half: Half) -> list[Run]:
    return [run for run in RUNS.values() if run.half == half]


def _replayed(runs: Sequence[Run], seeds: Sequence[int], ablation: Ablation) -> list[Outcome]:
    jobs = [(run.name, seed) for run in runs for seed in seeds if path_of(run.name, seed).exists()]
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(partial(_replay, ablation=ablation), jobs, chunksize=8))
    return [Outcome(run=RUNS[name], seed=seed, alerts=alerts) for (name, seed), alerts in zip(jobs, found, strict=True)]


def _replay(job: tuple[str, int], ablation: Ablation) -> tuple[object, ...]:
    name, seed = job
    return replay(RUNS[name], seed, load(path_of(name, seed)), ablation).alerts


def _explain(outcomes: Sequence[Outcome], *, verbose: bool) -> None:
    for outcome in outcomes:
        run, alert = outcome.run, outcome.first
        label = f"{run.name}/{outcome.seed}"
        for false in outcome.early:
            print(f"FALSE   {label}: {false.kind} ({false.symptom}) at {false.step}: {false.message}")
        if not run.is_sick:
            continue
        if alert is None:
            print(f"MISSED  {label}: {' '.join(run.kinds)}")
            continue
        causes = " > ".join(cause.name for cause in alert.causes)
        what = f"{label}: {alert.kind} ({alert.symptom}) at {alert.step}, {causes}"
        more = "; ".join(
            f"{other.kind} ({other.symptom}) at {other.step}" for other in outcome.alerts if other is not alert
        )
        if not outcome.kind_is_right:
            print(f"KIND    {what}; wanted {' '.join(run.kinds)}")
        if not outcome.cause_is_strict:
            print(f"{'CAUSE ' if not outcome.cause_is_acceptable else 'second'}  {what}; wanted {' '.join(run.causes)}")
        if verbose or more:
            print(f"        {what}  +[{more}]")


def _print_kinds(outcomes: Sequence[Outcome]) -> None:
    wanted = Counter(outcome.run.kinds[0] for outcome in outcomes if outcome.run.is_sick)
    found = Counter(outcome.run.kinds[0] for outcome in outcomes if outcome.first is not None)
    right = Counter(outcome.run.kinds[0] for outcome in outcomes if outcome.cause_is_acceptable)
    print("\n| kind | found | acceptable cause first |\n|---|---|---|")
    for kind, count in wanted.most_common():
        print(f"| `{kind}` | {share(found[kind], count)} | {share(right[kind], found[kind])} |")


def _print_peers(runs: Sequence[Run], seeds: Sequence[int]) -> None:
    jobs = [(run.name, seed) for run in runs for seed in seeds if path_of(run.name, seed).exists()]
    with ProcessPoolExecutor(2) as pool:
        firsts = list(pool.map(_peers, jobs, chunksize=8))
    sick = sum(RUNS[name].is_sick for name, _ in jobs)
    print("\n| rule | found | false alarms on healthy runs |\n|---|---|---|")
    for rule in PEERS:
        steps = [found[rule] for found in firsts]
        pairs = list(zip(jobs, steps, strict=True))
        found = sum(RUNS[name].is_sick and step is not None and step >= RUNS[name].onset for (name, _), step in pairs)
        false = sum(not RUNS[name].is_sick and step is not None for (name, _), step in pairs)
        print(f"| {rule} | {share(found, sick)} | {share(false, len(jobs) - sick)} |")


def _peers(job: tuple[str, int]) -> dict[str, int | None]:
    name, seed = job
    recorded = load(path_of(name, seed))
    lane = recorded[0].optimizer
    snapshots = [snapshot for snapshot in recorded if snapshot.optimizer == lane]
    return {label: rule(snapshots) for label, rule in PEERS.items()}
