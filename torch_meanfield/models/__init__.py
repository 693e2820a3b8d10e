"""The networks of the paper, made of mean-field layers.

In: a depth and a kind of block. Out: a module; ``torch_meanfield.models.timm`` registers them with timm.
The width wing is not known here.
"""

from torch_meanfield.models.resnet import MeanFieldResNet as MeanFieldResNet
