"""The plain reference: a whole Jacobian, one sample at a time."""

import torch
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel


def full_jacobian(model, x):
    """(B k, p), of all trained parameters."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for sample in x:
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = jacrev(lambda q, s=sample: functional_call(model, q, (s[None],)).reshape(-1))(parameters)
        rows.append(torch.cat([j.flatten(1) for j in jacobian.values()], 1))
    return torch.cat(rows).detach()
