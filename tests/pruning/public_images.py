"""Real images for tests with public weights, which are skipped where either is absent."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recipes.backbones.cifar_resnet import MEAN, STD

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def images(start: int, count: int, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``start`` to ``start + count`` of a fixed random order of cifar10-jpeg, normalised, and their labels."""
    with np.load(DATA / "cifar10_jpeg.npz") as archive:
        data, offsets, labels = (archive[f"{split}_{part}"] for part in ("jpeg", "offsets", "labels"))
    order = np.random.default_rng(0).permutation(len(labels))[start : start + count]
    raw = [Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())) for i in order]
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in raw])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std, torch.from_numpy(labels[order].astype(np.int64))
