"""
Reading ``diagnose``
====================

A deep tanh network with torch's default initialisation does not train. One call says why, and by which factor to
change it.
"""

# %%
# The patient
# -----------

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

from torch_meanfield.theory import critical, diagnose

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
images = torch.from_numpy(digits.images).float().flatten(1) / 8 - 1
labels = torch.from_numpy(digits.target)


def deep():
    torch.manual_seed(0)
    hidden = (m for _ in range(16) for m in (nn.Linear(128, 128), nn.Tanh()))
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), *hidden, nn.Linear(128, 10))


patient = deep()
found = diagnose(patient, (images[:64], labels[:64]))
print(found)

# %%
# How to read it
# --------------
#
# - **q** is the mean square of what a layer puts out, **corr** how alike the outputs of two inputs are. Where q
#   shrinks to 0, or corr goes to 1, the network forgets what it was shown.
# - **gradient** is the norm of the loss's gradient there. **chi** is what theory predicts of its square: the factor of
#   one layer, from the layer's own weights. Below 1 gradients vanish, above 1 they explode.
# - **depth** is over how many such layers either changes by a factor e. A network much deeper than that does not train.
# - **dead %** are units that give the same for every input.
# - Each line at the end is a finding, with what to do about it.
#
# The advice here is to scale the weights. The theory says by how much: the edge of chaos of tanh without biases.

edge = critical(torch.tanh, sigma_b=0.0).sigma_w


def on_the_edge():
    net = deep()
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=edge / layer.in_features**0.5)
            nn.init.zeros_(layer.bias)
    return net


print(diagnose(on_the_edge(), (images[:64], labels[:64])))

# %%
# Does it help?
# -------------


def train(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    losses = []
    for _ in range(300):
        index = torch.randint(len(labels), (64,))
        loss = nn.functional.cross_entropy(net(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


curves = {"torch's default": train(deep()), "on the edge of chaos": train(on_the_edge())}
print({name: round(sum(curve[-20:]) / 20, 2) for name, curve in curves.items()})

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for name, net in (("torch's default", patient), ("on the edge of chaos", on_the_edge())):
    layers = [layer for layer in diagnose(net, (images[:64], labels[:64])).layers if layer.kind == "Linear"]
    left.semilogy(range(1, len(layers) + 1), [layer.gradient for layer in layers], ".-", label=name)
    right.plot(curves[name], label=name)
left.set(xlabel="layer", title="norm of the gradient")
right.set(xlabel="step", title="training loss")
left.legend(frameon=False)
plt.show()
