#!/usr/bin/env python3
"""Why does this network not train? ``diagnose`` on four patients.

    python recipes/theory/diagnose.py [--batch 64]

A tanh MLP of 24 layers with torch's default initialisation, the same on the edge of chaos, a mean-field ResNet two
of whose particles have nearly met, and a trained residual MLP whose blocks were mixed up. The tables go to standard
output and the Markdown file, the first patient's picture to the PNG. Seconds.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from sklearn.datasets import load_digits
from torch import nn

from recipes.theory.deep import Teacher, deep_stack, train_
from recipes.theory.order import mixed
from recipes.theory.report import arguments, save
from recipes.theory.stacks import digits
from torch_meanfield import MeanFieldResNet
from torch_meanfield.theory import critical, diagnose

DEPTH, WIDTH, SIGMA_B = 24, 128, 0.05


def mlp() -> nn.Sequential:
    """A plain tanh network with torch's default initialisation."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, WIDTH), nn.Tanh()]
    for _ in range(DEPTH - 1):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def to_the_edge_(net: nn.Sequential) -> nn.Sequential:
    """The same network on the edge of chaos."""
    sigma_w = critical(torch.tanh, SIGMA_B).sigma_w.item()
    for m in net:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=sigma_w / m.in_features**0.5)
            nn.init.normal_(m.bias, std=SIGMA_B)
    return net


def resnet() -> MeanFieldResNet:
    """A mean-field ResNet, particle 2 of the first stage right behind particle 1."""
    model = MeanFieldResNet(20, in_chans=1, horizon=1.0)
    model.mean_field_layers()["stage1.particles"].set_tau_([0.5, 0.501, 1.0])
    return model


def main() -> None:
    parser = arguments("diagnose", __doc__)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    begun = time.perf_counter()
    batch = digits(args.batch), torch.from_numpy(load_digits().target[: args.batch])
    texts, results, picture = [], {}, None
    teacher, fallen = Teacher(args.seed), deep_stack(12, args.seed)
    train_(fallen, teacher, 150)
    regression = teacher.batch(256)
    for name, make in (
        ("tanh MLP, torch's default", mlp),
        ("tanh MLP, edge of chaos", lambda: to_the_edge_(mlp())),
        ("mean-field ResNet", resnet),
        ("residual MLP, blocks mixed up", lambda: mixed(fallen, "random", args.seed)),
    ):
        torch.manual_seed(args.seed)
        found = diagnose(make(), regression if "residual" in name else batch)
        texts.append(f"## {name}\n\n```\n{found}\n```\n")
        inner = [a for a in found.layers[1:-1] if a.kind == "Linear"]
        results[name] = {"findings": [str(f) for f in found.findings], "eigenvalues": found.kernel.eigenvalues.tolist()}
        results[name]["particles"] = [vars(p) for p in found.particles]
        if inner:
            rate = (inner[0].gradient / inner[-1].gradient) ** (2 / (len(inner) - 1))
            chi = torch.tensor([a.chi for a in inner[:-1]]).log().mean().exp().item()
            results[name] |= {"gradient_rate": rate, "gradient_rate_predicted": chi}
            texts.append(f"Squared gradient norms a layer: predicted x {chi:.3f}, measured x {rate:.3f}.\n")
        picture = found.plot() if picture is None else picture
    save(args, "diagnose", "\n".join(texts), {"batch": args.batch, "patients": results}, picture, begun)


if __name__ == "__main__":
    main()
