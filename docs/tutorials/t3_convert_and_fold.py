"""
Converting a timm backbone, and folding it
==========================================

``convert`` finds the residual branches of a model that somebody else wrote, and gives its blocks times. ``fold`` gives
a plain model back, for people who do not have this library.
"""

# %%
# Convert
# -------
#
# A small ViT for images of 8 x 8 pixels. The example input shows ``convert`` one forward pass; at first not one bit of
# the output changes.

import timm
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

from torch_meanfield import conversion_report, convert, fold

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
order = torch.randperm(len(digits.target))
images = torch.from_numpy(digits.images).float().unsqueeze(1)[order] / 8 - 1
labels = torch.from_numpy(digits.target)[order]


def new():
    size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 6, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)


model = new().eval()
before = model(images[:8])
convert(model, images[:1])
print("the same bits:", torch.equal(model(images[:8]), before))
print(conversion_report(model))

# %%
# Train
# -----
#
# The times of the stage are parameters of the model. Make the optimizer after ``convert``, so that it holds them.

model.train()
stage = conversion_report(model).stages[0].module
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(150):
    index = torch.randint(1297, (128,))
    loss = nn.functional.cross_entropy(model(images[index]), labels[index])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("steps now", [round(s, 2) for s in stage.steps().tolist()])

# %%
# Fold
# ----
#
# Each step is multiplied into the last weights of its branch. The ``state_dict`` of the copy is that of the plain
# model.

plain = new()
plain.load_state_dict(fold(model).state_dict())
with torch.no_grad():
    ours, theirs = model.eval()(images[1297:]), plain.eval()(images[1297:])
error = (theirs.argmax(1) != labels[1297:]).float().mean().item()
print(f"test error {100 * error:.1f} %, outputs at most {(ours - theirs).abs().max().item():.0e} apart")

# %%
# The picture: what the ViT learned about its steps, and that the folded model is the same function.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.bar(range(1, 7), stage.steps().tolist())
left.axhline(1, color="black", linewidth=0.8)
left.set(xlabel="block", title="step sizes that a ViT learned")
right.plot(theirs.flatten(), ours.flatten(), ".", markersize=3)
right.set(xlabel="logits of the folded plain model", ylabel="of the converted model", title="the same function")
plt.show()
