"""
Pruning depth, and exporting to ONNX
====================================

Which residual blocks does a trained network need? Score them, remove those of least worth, fold, and export a plain
network for any runtime.
"""

# %%
# A trained network
# -----------------
#
# A small timm ViT with eight blocks, converted, and trained on digits.

import tempfile
from pathlib import Path

import onnxruntime
import timm
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

from torch_meanfield import convert, depth_scores, fold, prune_depth_

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
order = torch.randperm(len(digits.target))
images = torch.from_numpy(digits.images).float().unsqueeze(1)[order] / 8 - 1
labels = torch.from_numpy(digits.target)[order]
size = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 8, "num_heads": 3}
model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)
convert(model, images[:2])


def train(steps, lr):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        index = torch.randint(1297, (64,))
        loss = nn.functional.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def error(net):
    return 100 * (net.eval()(images[1297:]).argmax(1) != labels[1297:]).float().mean().item()


train(400, 2e-3)
print(f"{error(model):.1f} % of the test images wrong, with eight blocks")

# %%
# Score the blocks
# ----------------
#
# A few batches of training images are enough. ``greedy`` takes the blocks out one after the other, each time the one
# without which the loss is least; the cosine is much cheaper, and needs no labels.

batches = [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 256, 64)]
greedy = depth_scores(model, batches, progress=False)
cosine = depth_scores(model, batches, by="cosine", progress=False)
print(greedy)

# %%
# Prune
# -----
#
# ``prune_depth_`` removes blocks in place; optimizers and averages follow. Training goes on for a little while.

report = prune_depth_(model, remove=3, scores=greedy, batches=batches)
print(report)
pruned = error(model)
train(150, 5e-4)
print(f"three blocks fewer: {pruned:.1f} % wrong, {error(model):.1f} % after a little more training")

# %%
# Fold and export
# ---------------
#
# ``fold`` gives a plain module of the depth that is left. From here on any tool will do, and none needs this library.
# Where a model was made with timm's own arguments, ``report.constructor`` builds the plain model that its weights load
# into.

plain = fold(model).eval()
path = Path(tempfile.mkdtemp()) / "pruned.onnx"
names = {"input_names": ["images"], "output_names": ["logits"]}
torch.onnx.export(plain, (images[:8],), path, dynamo=True, verbose=False, **names)
session = onnxruntime.InferenceSession(path)
(logits,) = session.run(None, {"images": images[:8].numpy()})
with torch.no_grad():
    apart = (torch.from_numpy(logits) - model.eval()(images[:8])).abs().max().item()
print(f"ONNX Runtime and the trained model: outputs at most {apart:.0e} apart")

# %%
# What each block is worth by the two scores. The loss rises slowly while blocks are left over, and then at once.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.bar(range(1, len(cosine) + 1), [score for _, score in cosine])
left.set(xlabel="block", title="1 - cosine of what goes in and comes out")
losses = [greedy.loss, *(greedy[name] for name in greedy.order[:-1])]
right.semilogy(range(len(losses)), losses, ".-")
right.axvline(3, color="0.7", linewidth=0.8)
right.set(xlabel="blocks removed", title="loss, the least needed first")
plt.show()
