"""`fit` against stock Pyro, NumPyro and PyMC: seconds, ELBO, error against reference posteriors.

Every contender runs in a process of its own, one at a time. Cold is its first fit, warm the second
in the same process; imports and loading data are not counted, but building, capturing, compiling
and optimising are, with the caches on disk as earlier processes left them. Stock Pyro (the better
of Adam 0.01 and ClippedAdam decaying tenfold in 10,000 steps) stops when its ELBO is within 0.1
nat of ours or at the limit; looking costs it nothing. NumPyro (Adam 0.01, from 8,000 steps on
decaying to 0.0001) and ADVI of PyMC have to be told the number of steps: theirs is the smallest of
a ladder that comes within 0.1 nat of ours, or the best before one takes half the limit. All ELBOs
are by the same evaluator on the same 20,000 fresh draws of our density, to which the densities of
their models are compared.

Run from the repository's root: python -m benchmarks.fit
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.peers.contract import Task
from benchmarks.posteriors import Posterior
from benchmarks.problems import NAMES, load, short_name, with_reference
from benchmarks.scoring import Elbo, Errors, count_data, elbo, errors, log_densities
from pyro_mf.density import LogJoint

WITHIN = 0.1  # nats
NUMPYRO_STEPS = (2_000, 8_000, 32_000, 128_000)
ADVI_STEPS = (10_000, 40_000, 160_000)
PEERS = ("stock Pyro", "NumPyro", "PyMC ADVI", "DADVI")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}


class Entry(NamedTuple):
    """One line of the table; ``warm`` is NaN where there was no second fit."""

    cold: float
    warm: float
    work: str
    stopped: str
    elbo: Elbo
    errors: Errors
    response: Errors | None
    fit: dict[str, Any]


class Judge:
    """Scores the contenders' fits of one posterior, all in the same way."""

    def __init__(self, posterior: Posterior, num_draws: int) -> None:
        self.posterior = with_reference(posterior)
        self.num_draws = num_draws
        self.log_joint = LogJoint(posterior.model, posterior.args, backend="graph")
        generator = torch.Generator().manual_seed(0)
        self.points = 0.3 * torch.randn(3, self.log_joint.size, generator=generator)

    def entry(self, answer: dict[str, Any]) -> Entry:
        """Score an answer.

        Raises:
            ValueError: If the contender's model has another density.
        """
        if answer["log_density"] is not None:
            self._check_density(torch.tensor(answer["log_density"]))
        fits = answer["fits"]
        loc, sd = (self._pack(fits[0][key]) for key in ("loc", "sd"))
        factor, response = fits[0]["covariance_factor"], None
        if factor is not None:
            response = self._errors(loc, torch.tensor(factor))
        return Entry(
            cold=fits[0]["seconds"],
            warm=fits[1]["seconds"] if len(fits) > 1 else np.nan,
            work=f"{fits[0]['gradients']:,} x {fits[0]['draws']}",
            stopped=fits[0]["stopped"],
            elbo=elbo(self.log_joint, loc, sd, num_draws=self.num_draws),
            errors=self._errors(loc, sd),
            response=response,
            fit=fits[0],
        )

    def points_by_site(self) -> dict[str, list]:
        """Where contenders are to state their models' densities."""
        return {k: v.tolist() for k, v in self.log_joint.layout.unpack(self.points).items()}

    def _errors(self, loc: Tensor, scale: Tensor) -> Errors:
        return errors(
            self.log_joint, loc, scale, self.posterior.reference, num_draws=self.num_draws
        )

    def _pack(self, by_site: dict[str, list]) -> Tensor:
        layout = self.log_joint.layout
        return layout.pack({s.name: torch.tensor(by_site[s.name]) for s in layout.sites})

    def _check_density(self, theirs: Tensor) -> None:
        ours = log_densities(self.log_joint, self.points, count_data(self.posterior.args))
        gap = theirs - ours
        if float((gap - gap[0]).abs().max()) > 1e-8 * (1 + float(ours.abs().max())):
            raise ValueError(f"the peer's model differs from ours by {gap.tolist()} nats.")


def ask(task: Task) -> dict[str, Any] | str:
    """Run a task in a fresh process; a sentence where nothing came back."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.peers.worker"],
            input=json.dumps(asdict(task)),
            capture_output=True,
            text=True,
            check=False,
            timeout=5 * task.limit,
            env={**ONE_THREAD, **os.environ},
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {5 * task.limit:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit status {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


def compete(judge: Judge, task: Task, ours: Entry) -> Entry | str:
    """The best that a peer can do: the soonest that is as good as ours, else the highest ELBO."""
    if task.contender == "stock Pyro":
        return _compete_once(judge, task, ours)
    best: Entry | None = None
    options = _ladder(task)
    found = options[0]
    for option in options if len(options) > 1 else ():
        answer = ask(replace(option, repeats=1))
        if isinstance(answer, str):
            return best or answer
        entry = judge.entry(answer)
        if best is None or entry.elbo.value > best.elbo.value:
            best, found = entry, option
        if _is_as_good(entry, ours) or entry.cold > task.limit / 2:
            break
    answer = ask(found)
    if isinstance(answer, str):
        return best or answer
    return judge.entry(answer)


def _ladder(task: Task) -> list[Task]:
    """The numbers of steps to try, for those that have to be told."""
    if task.contender == "NumPyro":
        return [replace(task, steps=n, decays=n > NUMPYRO_STEPS[0]) for n in NUMPYRO_STEPS]
    if task.contender == "PyMC ADVI":
        return [replace(task, steps=n) for n in ADVI_STEPS]
    return [task]


def _compete_once(judge: Judge, task: Task, ours: Entry) -> Entry | str:
    """Stock Pyro stops by itself; it has nothing that would be warm the second time."""
    target = {"loc": ours.fit["loc"], "sd": ours.fit["sd"]}
    task = replace(task, target=target, repeats=1, decays=True)
    answer = ask(task)
    if isinstance(answer, str):
        return answer
    best = judge.entry(answer)
    has_reached = best.stopped == "as good"
    # With the other step size it has to be sooner.
    again = ask(replace(task, decays=False, limit=best.cold if has_reached else task.limit))
    if isinstance(again, str):
        return best
    other = judge.entry(again)
    if has_reached != (other.stopped == "as good"):
        return best if has_reached else other
    if has_reached:
        return min(best, other, key=lambda entry: entry.cold)
    return max(best, other, key=lambda entry: entry.elbo.value)


def _is_as_good(entry: Entry, ours: Entry) -> bool:
    return entry.elbo.value >= ours.elbo.value - WITHIN


def make_table(title: str) -> Table:
    table = Table(title=title)
    for column in ("model", "contender"):
        table.add_column(column, no_wrap=True)
    for column in ("cold", "warm", "x ours", "gradients x draws", "ELBO"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("stopped", no_wrap=True)
    for column in ("mean", "log sd", "sd, rel"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def add_rows(table: Table, name: str, entries: dict[str, Entry | str]) -> None:
    ours = entries["ours"]
    for contender, entry in entries.items():
        label = f"{short_name(name)}" if contender == "ours" else ""
        if isinstance(entry, str):
            table.add_row(label, contender, *[""] * 5, entry[:40])
            continue
        ratio = ""
        if contender != "ours" and isinstance(ours, Entry):
            sign = "" if _is_as_good(entry, ours) else "> "
            ratio = f"{sign}{entry.cold / ours.cold:.1f}"
        table.add_row(
            label,
            contender,
            f"{entry.cold:.2f}",
            "" if np.isnan(entry.warm) else f"{entry.warm:.2f}",
            ratio,
            entry.work,
            f"{entry.elbo.value:.2f} ± {entry.elbo.se:.2f}",
            entry.stopped,
            *(f"{value:.3f}" for value in entry.errors),
        )
        if entry.response is not None:
            values = (f"{value:.3f}" for value in entry.response)
            table.add_row("", "  linear response", *[""] * 6, *values)
    table.add_section()


def make_summary(found: dict[str, dict[str, Entry | str]]) -> Table:
    """Medians over the models that a contender was given."""
    table = Table(title="Medians over models")
    table.add_column("contender")
    columns = ("models", "cold", "cold / ours", "ours sooner", "as good as ours")
    for column in (*columns, "mean", "log sd", "sd, rel"):
        table.add_column(column, justify="right")
    for contender in ("ours", *PEERS):
        pairs = [
            (entries[contender], entries["ours"])
            for entries in found.values()
            if isinstance(entries.get(contender), Entry) and isinstance(entries["ours"], Entry)
        ]
        if not pairs:
            continue
        ratios = [theirs.cold / ours.cold for theirs, ours in pairs]
        table.add_row(
            contender,
            str(len(pairs)),
            f"{np.median([theirs.cold for theirs, _ in pairs]):.2f}",
            f"{np.median(ratios):.1f}",
            str(sum(ratio > 1 for ratio in ratios)),
            str(sum(_is_as_good(*pair) for pair in pairs)),
            *(f"{x:.3f}" for x in np.median([theirs.errors for theirs, _ in pairs], 0)),
        )
        responses = [theirs.response for theirs, _ in pairs if theirs.response is not None]
        if responses:
            values = (f"{x:.3f}" for x in np.median(responses, 0))
            table.add_row("  linear response", str(len(responses)), *[""] * 4, *values)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of models' names")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per peer's fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    names = [n for n in NAMES if any(part in n for part in args.only)]
    limit, num_draws = (2.0, 200) if args.smoke else (args.limit, 20_000)
    if args.smoke:
        names, args.peers = names[:1], ("stock Pyro",)

    console = Console(width=170)
    found: dict[str, dict[str, Entry | str]] = {}
    for name in names:
        judge = Judge(load(name), num_draws)
        task = Task("ours", name, seed=args.seed, limit=120.0)
        answer = ask(task)
        entries: dict[str, Entry | str] = {
            "ours": answer if isinstance(answer, str) else judge.entry(answer)
        }
        if isinstance(entries["ours"], Entry):
            for peer in args.peers:
                points = {} if peer == "stock Pyro" else judge.points_by_site()
                peer_task = replace(task, contender=peer, limit=limit, points=points)
                entries[peer] = compete(judge, peer_task, entries["ours"])
        found[name] = entries
        table = make_table(f"{name}: D = {judge.log_joint.size}")
        add_rows(table, name, entries)
        console.print(table)
    whole = make_table(f"Seconds per fit, seed {args.seed}, peers stop at {limit:.0f} s")
    for name, entries in found.items():
        add_rows(whole, name, entries)
    console.print(whole)
    console.print(make_summary(found))


if __name__ == "__main__":
    main()
