"""
A first layer
=============

A residual block is a particle: weights and a time. This is the layer that runs its blocks in the order of their times,
what it computes, and what happens when the times are trained.
"""

# %%
# The layer
# ---------
#
# ``MeanFieldSequential`` takes the branches of a residual stack, without their skip connections. By default the times
# are 1, 2, ..., n. Each block acts for the time since the previous one, so all steps are 1 and this is the residual
# stack that you know, to the bit.

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

from torch_meanfield import MeanFieldSequential
from torch_meanfield.record import TauRecorder, plot_tau

torch.manual_seed(0)
torch.set_num_threads(1)


def branch():
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))


ordinary = MeanFieldSequential(*(branch() for _ in range(8)))
x = by_hand = torch.randn(5, 64)
for block in ordinary:
    by_hand = by_hand + block(by_hand)
print(ordinary.tau.tolist(), torch.equal(ordinary(x), by_hand))

# %%
# With ``horizon=1`` all blocks together act for a time of 1, and with a random start the steps differ.

stack = MeanFieldSequential(*(branch() for _ in range(8)), horizon=1.0, tau_init="random")
print("times", [round(t, 2) for t in stack.tau.tolist()])
print("steps", [round(s, 2) for s in stack.steps().tolist()])

# %%
# The times move
# --------------
#
# They are parameters. When a step of the optimizer makes two of them cross, the blocks change places inside
# ``optimizer.step()``, weights, optimizer state and all. The loop is the one you have; the recorder only looks.

digits = load_digits()
images = torch.from_numpy(digits.images).float().flatten(1) / 8 - 1
labels = torch.from_numpy(digits.target)
model = nn.Sequential(stack, nn.LayerNorm(64), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
with TauRecorder(model) as recorder:
    recorder.record(0)
    for step in range(1, 401):
        index = torch.randint(1297, (128,))
        loss = nn.functional.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recorder.record(step)

with torch.no_grad():
    error = (model(images[1297:]).argmax(1) != labels[1297:]).float().mean().item()
(trajectory,) = recorder.trajectories.values()
print(f"test error {100 * error:.1f} %, {len(trajectory.resorts)} re-sorts")

# %%
# One line is one block, dark where it began early. Lines that cross are blocks that changed places; the ticks at the
# foot are the re-sorts.

figure, axis = plt.subplots(figsize=(7, 4))
for i, curve in enumerate(zip(*trajectory.tau, strict=True)):
    axis.plot(trajectory.steps, curve, color=plt.cm.viridis(0.9 * i / 7))
axis.vlines(trajectory.resorts, 0, 0.03, transform=axis.get_xaxis_transform(), color="crimson", linewidth=0.8)
axis.set(xlabel="optimizer step", ylabel="time", title="Eight blocks while they learn digits")
plt.show()

# %%
# The library draws the same picture for all layers of a model: ``plot_tau(recorder.trajectories)`` returns a figure.

print(plot_tau(recorder.trajectories).axes[0].get_title())
