"""Is there a cat behind the door? A hidden label with prior 1/3, its factor, and the exact answer.

One label: q(cat) is as free as the posterior, so the fit is exact and the ELBO is the log evidence,
whatever is heard. Many labels: cats in the rooms of a house, whose window is open or not. Given the
window rooms are independent, but the posterior ties them, and a factor for each is too sure of
itself, open or closed by where it starts. A factor for the window alone, with rooms summed out, is
exact again.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files, on machines without a screen too

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_mf as mf
from pyro_mf.solvers.coordinate_ascent import solve_coordinates

PRIOR = 1 / 3
NOISE = torch.tensor(
    [0.2, 0.6], dtype=torch.float64
)  # chance of a sound at the door, without and with a cat
HEARD = torch.tensor([0, 1, 0, 1, 0, 1, 1, 0], dtype=torch.float64)
# Sounds heard in each of the rooms of the house, of three tries.
SOUNDS = torch.tensor([1, 2, 1, 0, 2, 1], dtype=torch.float64)
HOME = torch.tensor(
    [0.05, 0.7], dtype=torch.float64
)  # chance of a cat in a room, with the window closed and open


def door(heard: Tensor) -> None:
    """One hidden label and several noisy observations of it."""
    cat = pyro.sample("cat", dist.Bernoulli(PRIOR))
    with pyro.plate("tries", len(heard)):
        pyro.sample("heard", dist.Bernoulli(NOISE[cat.long()]), obs=heard)


def house(sounds: Tensor) -> None:
    """A plate of labels, tied by one more."""
    window = pyro.sample("window", dist.Bernoulli(PRIOR))
    with pyro.plate("rooms", len(sounds)):
        cat = pyro.sample("cat", dist.Bernoulli(HOME[window.long()]))
        pyro.sample("sounds", dist.Binomial(3, NOISE[cat.long()]), obs=sounds)


@dataclass
class Answer:
    """Probabilities of the labels, and a bound of the log evidence in nats."""

    name: str
    probs: Tensor  # of the value 1
    bound: float


def exact(model: Callable[..., None], data: Tensor, sizes: dict[str, int]) -> Answer:
    """Posterior by running the model at every joint value of its labels."""
    log_joints, values = [], []
    for bits in itertools.product([0.0, 1.0], repeat=sum(sizes.values())):
        parts = torch.tensor(bits).split(list(sizes.values()))
        labels = {n: p if sizes[n] > 1 else p[0] for n, p in zip(sizes, parts, strict=True)}
        trace = poutine.trace(poutine.condition(model, labels)).get_trace(data)
        log_joints.append(trace.log_prob_sum())
        values.append(torch.tensor(bits))
    log_joint = torch.stack(log_joints)
    return Answer(
        "exact", log_joint.softmax(0) @ torch.stack(values), float(log_joint.logsumexp(0))
    )


def fit(
    name: str,
    model: Callable[..., None],
    data: Tensor,
    family: str | dict[str, str],
    start: dict[str, float] | None = None,
) -> Answer:
    """Factors at their best, one exact update after another, from all at 1/2 or a start given."""
    guide = mf.AutoMeanField(model, family).setup(data)
    for site, prob in (start or {}).items():
        guide.set_log_probs(site, torch.tensor([1 - prob, prob]).log())
    outcome = solve_coordinates(model, guide, (data,))
    probs = [guide.probs(site.name)[..., 1].reshape(-1) for site in guide.discrete_sites]
    return Answer(name, torch.cat(probs).detach(), outcome.elbo)


def fit_by_svi(model: Callable[..., None], data: Tensor, num_steps: int) -> Answer:
    """The same by stock SVI: the loss has no noise, so a fixed step length will do."""
    guide = mf.AutoMeanField(model, "bernoulli")
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=mf.ReverseKL())
    for _ in range(num_steps):
        loss = svi.step(data)
    return Answer("q by stock SVI", guide.probs("cat")[1:].detach(), -loss)


def picture(at_door: list[tuple[Answer, Answer]], in_house: list[Answer], path: Path) -> None:
    """The label as evidence comes in, and the labels of the house."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    count = range(1, len(at_door) + 1)
    left.plot(count, [float(a.probs) for a, _ in at_door], "k-", lw=2, label="exact posterior")
    left.plot(count, [float(q.probs) for _, q in at_door], "o", color="tab:orange", label="q(cat)")
    left.axhline(PRIOR, color="0.7", ls=":")
    left.annotate("prior 1/3", (7.2, PRIOR - 0.05), color="0.5")
    left.set(xlabel="tries", ylabel="P(cat)", ylim=(0, 1), title="one label: exact")
    left.legend(frameon=False)
    names = ["window", *(f"room {i}" for i in range(len(SOUNDS)))]
    styles = (
        ("k", "_", 500),
        ("tab:orange", "v", 40),
        ("tab:orange", "^", 40),
        ("tab:blue", "x", 60),
    )
    for answer, (colour, marker, size) in zip(in_house, styles, strict=True):
        x = names[: len(answer.probs)]
        label = f"{answer.name}: {answer.bound:.3f} nats"
        right.scatter(
            x, answer.probs, size, color=colour, marker=marker, label=label, clip_on=False
        )
    right.set(ylim=(0, 1), title="labels that the posterior ties together")
    right.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    figure.savefig(path, dpi=150)


def make_table(rows: list[Answer], title: str) -> Table:
    table = Table("", title=title)
    for column in ("P(label = 1)", "log evidence or ELBO"):
        table.add_column(column, justify="right", no_wrap=True)
    for answer in rows:
        probs = "  ".join(f"{p:.4f}" for p in answer.probs)
        table.add_row(answer.name, probs, f"{answer.bound:.6f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # arrays of this size are slower on several threads
    at_door = []
    for count in (1, len(HEARD)) if args.smoke else range(1, len(HEARD) + 1):
        data = HEARD[:count]
        at_door.append((exact(door, data, {"cat": 1}), fit("q", door, data, "bernoulli")))
    truth, by_updates = at_door[-1]
    by_svi = fit_by_svi(door, HEARD, 20 if args.smoke else 600)
    in_house = [
        exact(house, SOUNDS, {"window": 1, "cat": len(SOUNDS)}),
        fit("a factor for every label", house, SOUNDS, "bernoulli"),
        fit("the same, started with it open", house, SOUNDS, "bernoulli", {"window": 0.99}),
        fit("for the window, rooms summed out", house, SOUNDS, {"window": "bernoulli"}),
    ]
    path = args.out / "hidden_cat.png"
    picture(at_door, in_house, path)
    console = Console(width=140)
    console.print(
        make_table(
            [truth, by_updates, by_svi],
            f"A cat behind the door: {int(HEARD.sum())} sounds in {len(HEARD)} tries",
        )
    )
    console.print(make_table(in_house, "Window, then the rooms"))
    gaps = [in_house[0].bound - answer.bound for answer in in_house[1:3]]
    loss = in_house[0].bound - in_house[-1].bound
    print(f"One label: ELBO - log evidence is {by_updates.bound - truth.bound:.1e} nats.")
    print(f"A factor for each of the house: KL(q || p) is {gaps[0]:.4f} or {gaps[1]:.4f} nats.")
    print(f"For the window, rooms summed out: {abs(loss):.1e} nats.")
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
