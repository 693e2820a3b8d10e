#!/usr/bin/env python3
# A tour of torch-meanfield, to be read and run from top to bottom: `python recipes/tour.py`, or cell by cell in an
# editor that knows `# %%`. Real images (scikit-learn's digits), one CPU core, under two minutes; four pictures in
# runs/tour/.

# %% What everything below uses
from __future__ import annotations

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from torch_meanfield import BirthDeathOptimizer, MeanFieldSequential, conversion_report, convert, fold, subscribe
from torch_meanfield.lightning import Trajectory, plot_tau

torch.set_num_threads(1)  # for tensors this small a second thread is only in the way
torch.manual_seed(0)
out = Path("runs/tour")
out.mkdir(parents=True, exist_ok=True)

bunch = load_digits()
order = torch.randperm(len(bunch.target))
images = torch.from_numpy(bunch.images).float()[order] / 8 - 1  # 1,797 images of 8x8, in -1..1
labels = torch.from_numpy(bunch.target)[order]
train, test = slice(0, 1297), slice(1297, None)


def batches(steps, seed=0):
    """Random batches of 128 training images."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(1297, (128,), generator=generator)
        yield images[train][index], labels[train][index]


def error(model, inputs):
    """Test error in percent."""
    with torch.no_grad():
        return 100 * (model(inputs[test]).argmax(1) != labels[test]).float().mean().item()


# %% 1. A layer
# A residual block is a particle: weights theta and a time tau. The layer runs its particles in the order of time,
#     x  ->  x + (tau_l - tau_{l-1}) * f(x, theta_l),
# so it is Euler's method on a grid of its own making. With horizon=None the times are 1, 2, ..., n, all steps are 1,
# and the layer is the residual stack you know, to the bit. With horizon=1 and a random start, the grid is uneven.


def branch():
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))


ordinary = MeanFieldSequential(*(branch() for _ in range(8)))
x = images.flatten(1)[:5]
by_hand = x
for f in ordinary:
    by_hand = by_hand + f(by_hand)
assert torch.equal(ordinary(x), by_hand)

stack = MeanFieldSequential(*(branch() for _ in range(8)), horizon=1.0, tau_init="random")
print("times:", stack.tau.tolist())
print("steps:", stack.steps().tolist())

state, path = x, [x]
for step, f in zip(stack.steps(), stack, strict=True):
    state = state + step * f(state)
    path.append(state)
figure = Figure(figsize=(6, 3.5), layout="constrained")
axis = figure.subplots()
moved = torch.stack([(each - x).norm(dim=1) for each in path]).detach()
times = [0.0, *stack.tau.tolist()]
axis.plot(times, moved, ".-")
axis.vlines(times[1:], 0, 1, transform=axis.get_xaxis_transform(), color="0.85", zorder=0)
axis.set(xlabel="time tau", ylabel="distance from the input", title="five digits on their way through eight blocks")
figure.savefig(out / "1-layer.png", dpi=120)

# %% 2. Its times move
# The times are trained like any parameter. When a step of the optimizer makes two of them cross, the blocks change
# places (weights, optimizer state and all) inside optimizer.step(): nothing is added to the loop. `subscribe` lets us
# watch.

model = nn.Sequential(nn.Flatten(), stack, nn.LayerNorm(64), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
trajectory = Trajectory(len(stack))
moment = 0
handle = subscribe(lambda motion: trajectory.move(motion.index, resorted_at=moment), model=model)
for moment, (inputs, targets) in enumerate(batches(400), start=1):
    if moment % 4 == 1:
        trajectory.record(moment, stack.tau)
    loss = F.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
handle.remove()
print(f"test error {error(model, images):.1f} %, {len(trajectory.resorts)} re-sorts")
print("steps now:", [round(step, 2) for step in stack.steps().tolist()])
plot_tau({"eight blocks": trajectory}, title="Times of the blocks while they learn digits").savefig(
    out / "2-times.png", dpi=120
)

# %% 3. A backbone, converted and folded
# `convert` finds the residual branches of a model that somebody else wrote, here a small timm ViT. At first not one bit
# of its output changes. After the training `fold` gives a plain model back, for people who do not have this library.

size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 6, "num_heads": 3}


def new():
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)


plain = new()
pixels = images.unsqueeze(1)
backbone = convert(plain, pixels[:1])
print(conversion_report(backbone))
assert torch.equal(backbone.eval()(pixels[:8]), plain.eval()(pixels[:8]))

backbone.train()
optimizer = torch.optim.AdamW(backbone.parameters(), lr=2e-3)
for inputs, targets in batches(150):
    loss = F.cross_entropy(backbone(inputs.unsqueeze(1)), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
folded = new()
folded.load_state_dict(fold(backbone).state_dict())  # plain weights into an untouched timm model
ours, theirs = backbone.eval()(pixels[test]).detach(), folded.eval()(pixels[test]).detach()
apart = (ours - theirs).abs().max().item()
print(f"test error {error(backbone, pixels):.1f} %; folded {error(folded, pixels):.1f} %, outputs {apart:.0e} apart")
assert apart < 1e-3

stage = conversion_report(backbone).stages[0].module
figure = Figure(figsize=(9, 3.5), layout="constrained")
left, right = figure.subplots(1, 2)
left.bar(range(1, len(stage.steps()) + 1), stage.steps().tolist())
left.axhline(1, color="black", linewidth=0.8)
left.set(xlabel="block", ylabel="step size", title="step sizes that a ViT learnt")
right.plot(theirs.flatten(), ours.flatten(), ".", markersize=3)
right.set(xlabel="logits of the folded plain model", ylabel="of the converted model", title="folded: the same function")
figure.savefig(out / "3-fold.png", dpi=120)

# %% 4. An optimizer, wrapped
# In width the particles are neurons. Half of the ReLUs of this network begin dead: their biases are so low that no
# image reaches them, and no gradient wakes them. BirthDeathOptimizer wraps the optimizer you have; every 20 steps here,
# units that have died, or that do harm, give their place to new ones.


def half_dead():
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    with torch.no_grad():
        mlp[1].bias[:64] -= 10
    return mlp


def alive(mlp):
    """How many of the 128 units some training image reaches."""
    with torch.no_grad():
        return int((mlp[:3](images[train]) > 0).any(0).sum())


def learn(mlp, optimizer):
    """Alive units and test error along 300 steps."""
    curve = []
    for step, (inputs, targets) in enumerate(batches(300)):
        if step % 10 == 0:
            curve.append((step, alive(mlp), error(mlp, images)))
        loss = F.cross_entropy(mlp(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return curve


bare, wrapped = half_dead(), half_dead()
curves = {
    "Adam": learn(bare, torch.optim.Adam(bare.parameters(), lr=1e-3)),
    "Adam, wrapped": learn(
        wrapped, BirthDeathOptimizer(torch.optim.Adam(wrapped.parameters(), lr=1e-3), wrapped, every=20)
    ),
}
for name, curve in curves.items():
    print(f"{name}: {curve[-1][1]} of 128 units alive, test error {curve[-1][2]:.1f} %")
figure = Figure(figsize=(9, 3.5), layout="constrained")
panels = figure.subplots(1, 2)
for column, (panel, title) in enumerate(zip(panels, ("units alive, of 128", "test error, %"), strict=True), start=1):
    for name, curve in curves.items():
        panel.plot([point[0] for point in curve], [point[column] for point in curve], label=name)
    panel.set(xlabel="optimizer step", title=title)
    panel.legend(frameon=False)
figure.savefig(out / "4-births.png", dpi=120)

# %% Where to go on
# recipes/cifar.py trains the published networks, recipes/table.py their whole table, recipes/finetune_timm.py any timm
# backbone; docs/theory/README.md shows the mathematics, each prediction beside its measurement.
print("pictures:", *(str(path) for path in sorted(out.glob("*.png"))))
