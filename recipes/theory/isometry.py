#!/usr/bin/env python3
"""Isometry: a vanilla tanh CNN of 10,000 layers trains; with He initialisation it cannot.

    python recipes/theory/isometry.py [--depth 10000] [--steps 100]

The network is that of ``recipes/theory/deep_cnn.py`` on 8x8 digits: delta-orthogonal weights on the edge of chaos at a
length of 0.1 / depth (Xiao et al. 2018), and He initialisation beside it, at the same and at smaller learning rates.
Then the spectrum of the input-output Jacobian of fully connected networks beside its predicted variance (Pennington et
al. 2017), and gradients through 400 steps of a recurrent network (Chen et al. 2018). Four minutes on one core.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from recipes.theory.deep_cnn import DeepCNN, gradient_norms, he_, isometric_, train
from recipes.theory.report import arguments, figure, save, table
from recipes.theory.stacks import digits
from torch_meanfield.theory.isometry import critical_orthogonal_, edge_at, jacobian_moments, jacobian_spectrum

CHANNELS, BATCH, LR = 8, 16, 0.04  # the learning rate is LR / depth: all layers together move the function
SPECTRUM = {"depth": 16, "width": 300, "draws": 3}
STEPS_OF_RNN, HIDDEN = 400, 128


def run_cnn(args: Any) -> dict[str, Any]:
    """Gradient norms at the start and losses, isometric and He."""
    images, labels = digits(1797), torch.from_numpy(load_digits().target)
    order = torch.randint(len(images), (args.steps, BATCH), generator=torch.Generator().manual_seed(args.seed))
    edge = edge_at(torch.tanh, 0.1 / args.depth)
    out: dict[str, Any] = {"gain": edge.sigma_w.item(), "q": edge.q_star.item()}
    for name, lrs in (("isometric", (LR,)), ("He", (LR, 1e-4 * LR, 1e-8 * LR))):
        for lr in lrs:
            torch.manual_seed(args.seed)
            model = DeepCNN(args.depth, CHANNELS, edge.q_star.item())
            isometric_(model, edge.sigma_w.item()) if name == "isometric" else he_(model)
            norms = gradient_norms(model, images[order[0]], labels[order[0]])
            losses = train(model, lambda k: (images[order[k]], labels[order[k]]), args.steps, lr / args.depth)
            out[f"{name}, learning rate {lr:g} / depth"] = {"gradient_norms": norms.tolist(), "losses": losses}
            print(
                f"{name} {lr:g}: first {norms[0]:.3g}, last {norms[-1]:.3g}, losses {losses[:1]} {losses[-1:]}",
                flush=True,
            )
    return out


def run_spectrum(seed: int) -> dict[str, dict[str, Any]]:
    """Squared singular values of tanh networks' Jacobians, Gaussian and orthogonal, beside their moments."""
    torch.manual_seed(seed)
    depth, n, out = SPECTRUM["depth"], SPECTRUM["width"], {}
    edge = edge_at(torch.tanh, 0.05)
    for law in ("gaussian", "orthogonal"):
        values = []
        for _ in range(SPECTRUM["draws"]):
            weights = [edge.sigma_w.float() * draw(law, n) for _ in range(depth)]
            biases = torch.randn(depth, n) * edge.sigma_b.float()

            def network(h: Tensor, weights: list[Tensor] = weights, biases: Tensor = biases) -> Tensor:
                for w, b in zip(weights, biases, strict=True):
                    h = w @ h.tanh() + b
                return h

            values.append(jacobian_spectrum(network, torch.randn(n) * edge.q_star.sqrt().float()).square())
        mean, variance = jacobian_moments(torch.tanh, edge.sigma_w, edge.q_star, depth, law)
        v = torch.cat(values)
        out[law] = {"mean": v.mean().item(), "variance": v.var().item(), "values": v.sort().values.tolist()}
        out[law] |= {"mean_predicted": mean.item(), "variance_predicted": variance.item()}
    return out


def draw(law: str, n: int) -> Tensor:
    """A matrix that keeps lengths, on average or exactly."""
    return torch.randn(n, n) / n**0.5 if law == "gaussian" else nn.init.orthogonal_(torch.empty(n, n))


def run_rnn(seed: int) -> dict[str, list[float]]:
    """Gradient norms of the last hidden state at every earlier one, by initialisation."""
    out = {}
    for name in ("critical orthogonal", "torch's default", "He"):
        torch.manual_seed(seed)
        cell = nn.RNNCell(8, HIDDEN)
        length = torch.tensor(0.01)
        if name == "critical orthogonal":
            length = critical_orthogonal_(cell, input_scale=0.01)[0].q_star.float()
        elif name == "He":
            for p in cell.parameters():
                nn.init.kaiming_normal_(p) if p.ndim == 2 else nn.init.zeros_(p)
        h = (torch.randn(16, HIDDEN) * length.sqrt()).tanh().requires_grad_()
        states = [h]
        for x in torch.randn(STEPS_OF_RNN, 16, 8):
            states.append(cell(x, states[-1]))
            states[-1].retain_grad()
        (states[-1] * torch.randn_like(states[-1])).sum().backward()
        out[name] = [float(s.grad.double().norm()) for s in states if s.grad is not None]
    return out


def main() -> None:
    parser = arguments("isometry", __doc__)
    parser.add_argument("--depth", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    begun = time.perf_counter()
    cnn, spectrum, rnn = run_cnn(args), run_spectrum(args.seed), run_rnn(args.seed)
    made, (first, second, third, fourth) = figure(4, width=3.9)
    rows = []
    for i, (name, run) in enumerate((k, v) for k, v in cnn.items() if isinstance(v, dict)):
        norms, losses = torch.tensor(run.pop("gradient_norms"), dtype=torch.float64), run["losses"]
        run["gradient_norms_every_100th"] = [v if v < float("inf") else str(v) for v in norms[::100].tolist()]
        run["losses"] = [v if v == v and v < float("inf") else str(v) for v in losses]
        first.plot(norms.clamp(max=1e30), color=f"C{i}", label=name)
        second.plot(losses, color=f"C{i}", marker="" if len(losses) > 2 else "x", label=name)
        ends = [sum(part) / len(part) for part in (losses[:10], losses[-10:])]
        rows.append([name, norms[0].item(), norms[-1].item(), (norms[0] / norms[-1]).item(), len(losses), *ends])
    first.set(title=f"gradient norm at the start, {args.depth:,} layers", xlabel="layer", yscale="log")
    second.set(title="training loss, 8x8 digits", xlabel="step", ylim=(0, 5))
    for i, (law, s) in enumerate(spectrum.items()):
        label = f"{law}: variance {s['variance']:.2f}, predicted {s['variance_predicted']:.2f}"
        third.hist(s.pop("values"), bins=60, range=(0, 8), density=True, alpha=0.6, color=f"C{i}", label=label)
        rows.append([f"Jacobian, {law}: mean and variance", s["mean"], s["variance"]])
        rows[-1] += ["predicted", "", s["mean_predicted"], s["variance_predicted"]]
    third.set(title="squared singular values, 16 tanh layers", yscale="log")
    for name, norms in rnn.items():
        fourth.plot(norms, label=name)
        rows.append([f"RNN, {name}", norms[0], norms[-1], norms[0] / norms[-1], "", "", ""])
    fourth.set(title="gradient through a tanh RNN", xlabel="time step", yscale="log")
    for axis in (first, second, third, fourth):
        axis.legend(fontsize=6)
    header = ["network", "first gradient", "last gradient", "ratio", "steps", "loss, first 10", "last 10"]
    results = {"depth": args.depth, "channels": CHANNELS, "batch": BATCH, "cnn": cnn, "spectrum": spectrum, "rnn": rnn}
    save(args, "isometry", table(header, rows), results, made, begun)


if __name__ == "__main__":
    main()
