"""
Keeping a network plastic on a stream
=====================================

The data stay, and the task changes: digits whose labels are drawn anew, again and again. A network that learned its
first task well learns the twentieth hardly at all, since its units have died. One line keeps it going.
"""

# %%
# A stream of tasks
# -----------------
#
# 256 digits keep their pixels; at every task each gets a random label. There is nothing to generalise: the only
# question is whether the network can still be trained.

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

from torch_meanfield import BirthDeathOptimizer

torch.set_num_threads(1)
images = torch.from_numpy(load_digits().images[:256]).float().flatten(1) / 16


def learn(wrap):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    if wrap:
        optimizer = BirthDeathOptimizer(optimizer, net, scheme="plastic", example_input=images[:2])  # the one line
    accuracy, silent = [], []
    for _ in range(20):
        labels = torch.randint(10, (256,))
        for _ in range(20):
            for batch in torch.randperm(256).split(16):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            accuracy.append((net(images).argmax(1) == labels).float().mean().item())
            hidden = torch.cat([net[:2](images), net[:4](images)], dim=1)
            silent.append((hidden == 0).all(0).float().mean().item())
    return accuracy, silent, optimizer


bare_accuracy, bare_silent, _ = learn(wrap=False)
accuracy, silent, optimizer = learn(wrap=True)
print(f"last five tasks: Adam {sum(bare_accuracy[-5:]) / 5:.2f}, wrapped {sum(accuracy[-5:]) / 5:.2f}, chance 0.10")

# %%
# What it knows
# -------------
#
# ``dormant()`` gives the units that are dormant now, by population, and ``ages()`` how many steps each has lived since
# it was born.

for population, dormant in zip(optimizer.populations, optimizer.dormant().values(), strict=True):
    print(population.name, population.size, "units,", int(dormant.sum()), "dormant")

# %%
# Units that no image reaches get no gradient, and few of them ever wake. Replaced within five steps of their death,
# they go on learning.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for axis, bare, wrapped, title in (
    (left, bare_accuracy, accuracy, "accuracy at the end of a task"),
    (right, bare_silent, silent, "share of units that no image reaches"),
):
    axis.plot(range(1, 21), bare, color="0.5", label="Adam")
    axis.plot(range(1, 21), wrapped, color="crimson", label='with scheme="plastic"')
    axis.set(title=title, xlabel="task", ylim=(0, 1), xticks=range(0, 21, 5))
left.legend(frameon=False)
plt.show()
