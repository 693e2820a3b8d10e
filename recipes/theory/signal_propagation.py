#!/usr/bin/env python3
"""Signal propagation: lengths and correlations through 30 layers of width 4,096, and the phase diagram of tanh.

    python recipes/theory/signal_propagation.py [--width 4096] [--depth 30] [--networks 128]

Predicted by the maps of Poole et al. 2016, measured on random networks; the picture has the phase diagram, whose edge
of chaos is solved for (Hayou et al. 2018). About a minute on two cores.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is found from here
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import nn

from recipes.theory.report import arguments, figure, save, table
from recipes.theory.wide import Setting, measure
from torch_meanfield.theory.phase import critical, phase
from torch_meanfield.theory.signal import propagate

SETTINGS = (
    Setting("tanh, ordered", torch.tanh, 1.1, 0.3, 2.0, 0.2),
    Setting("tanh, edge of chaos", torch.tanh, 1.76**0.5, 0.05**0.5, 2.0, 0.2),
    Setting("tanh, chaotic", torch.tanh, 2.0, 0.3, 0.5, 0.9),
    Setting("ReLU, critical", torch.relu, 2**0.5, 0.0, 1.0, 0.2),
    Setting("ReLU, ordered", torch.relu, 1.2, 0.5, 3.0, 0.2),
    Setting("GELU, ordered", nn.GELU(), 1.5**0.5, 0.5, 2.0, 0.2),
)
SIZE = 100  # of the phase diagram, each way


def main() -> None:
    parser = arguments("signal_propagation", __doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=30)
    parser.add_argument("--networks", type=int, default=128)
    args = parser.parse_args()
    begun = time.perf_counter()
    q, c = measure(SETTINGS, args.width, args.depth, args.networks, args.seed)
    rows, curves = [], []
    made, (left, middle, right) = figure(3)
    for i, s in enumerate(SETTINGS):
        predicted = propagate(s.activation, args.depth, s.sigma_w, s.sigma_b, q=s.q, c=s.c)
        limit = phase(s.activation, s.sigma_w, s.sigma_b, q=s.q)
        off = [float((a / b - 1).abs().max()) for a, b in ((q[i], predicted.q), (c[i], predicted.c))]
        rows.append([s.name, s.sigma_w**2, s.sigma_b**2, limit.chi_1.item(), limit.q_star.item(), limit.c_star.item()])
        rows[-1] += [limit.xi_c.item(), 100 * off[0], 100 * off[1]]
        for axis, at, line in ((left, q[i], predicted.q), (middle, c[i], predicted.c)):
            axis.plot(line, color=f"C{i}")
            axis.plot(at, ".", color=f"C{i}", label=s.name)
        curves.append({"setting": s.name, "q": q[i].tolist(), "q_predicted": predicted.q.tolist()})
        curves[-1] |= {"c": c[i].tolist(), "c_predicted": predicted.c.tolist()}
    left.set(title="length q: predicted (lines), measured", xlabel="layer", yscale="log")
    middle.set(title="correlation c", xlabel="layer")
    middle.legend(fontsize=7)
    w, b = torch.linspace(0.05, 4, SIZE), torch.linspace(0, 1, SIZE)
    diagram = phase(torch.tanh, w[:, None], b)
    shades = right.pcolormesh(b**2, w**2, diagram.c_star, cmap="viridis", shading="auto", rasterized=True)
    made.colorbar(shades, label="c*")
    edge = [critical(torch.tanh, float(v)).sigma_w.item() ** 2 for v in b]
    right.plot(b**2, edge, color="white", linewidth=2, label="edge of chaos, chi_1 = 1")
    right.set(title="phases of tanh networks", xlabel=r"$\sigma_b^2$", ylabel=r"$\sigma_w^2$", xlim=(0, 1), ylim=(0, 6))
    right.legend(fontsize=7, loc="lower right")
    header = ["setting", "sigma_w^2", "sigma_b^2", "chi_1", "q*", "c*", "xi_c", "worst error of q, %", "of c, %"]
    known = {"relu_critical_w2": critical(torch.relu).sigma_w.item() ** 2}
    known["tanh_critical_w2_at_b2_0.05"] = critical(torch.tanh, 0.05**0.5).sigma_w.item() ** 2
    results = {"width": args.width, "networks": args.networks, "known": known, "rows": rows, "curves": curves}
    results["edge"] = {"sigma_b": b.tolist(), "sigma_w2": edge}
    save(args, "signal_propagation", table(header, rows), results, made, begun)


if __name__ == "__main__":
    main()
