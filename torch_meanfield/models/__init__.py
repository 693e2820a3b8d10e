"""The networks of the paper, made of mean-field layers."""

from torch_meanfield.models.resnet import MeanFieldResNet as MeanFieldResNet
