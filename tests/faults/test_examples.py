"""What a model is called with: keywords, both kinds of arguments, and inputs whose first dimension is no batch."""

from dataclasses import dataclass
from inspect import signature

import pytest
import torch
from torch import nn

from torch_meanfield import BirthDeathOptimizer, conversion_report, convert, find_populations, fold
from torch_meanfield.observe import tensors_in
from torch_meanfield.width.optimizer.discovery import shortened


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)


class Keyword(Net):
    """As Hugging Face's models are called: ``model(input_values=t)``, ``model(**batch)``."""

    def forward(self, input_values=None, attention_mask=None, labels=None):
        y = self.outer(self.inner(input_values).relu())
        y = y if attention_mask is None else y * attention_mask[..., None]
        return {"logits": y} if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


class Graph(Net):
    """As in PyTorch Geometric: ``model(x, edge_index)``."""

    def forward(self, x, edge_index):
        source, target = edge_index
        h = self.inner(x).relu()
        return self.outer(torch.zeros_like(h).index_add_(0, target, h[source]))


class Encoder(nn.Module):
    """``TransformerEncoder(src, mask)`` with the sequence first."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, src, mask=None):
        return self.encoder(src, mask)


@dataclass
class Batch:
    x: torch.Tensor
    index: torch.Tensor


class Held(Graph):
    """One object that holds everything, and scalars of no batch."""

    def forward(self, batch, scale=1.0):
        return super().forward(batch.x, batch.index) * scale


X, EDGES = torch.randn(6, 4), torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
CALLS = [
    (Keyword, (), {"input_values": X}),
    (Keyword, (), {"input_values": torch.randn(6, 3, 4), "attention_mask": torch.ones(6, 3), "labels": torch.zeros(1)}),
    (Keyword, (X,), {"labels": torch.zeros(6, 4)}),
    (Graph, (X, EDGES), {}),
    (Graph, (X,), {"edge_index": EDGES}),
    (Encoder, (torch.randn(6, 2, 4),), {"mask": torch.zeros(6, 6)}),
    (Encoder, (torch.randn(6, 2, 4), torch.zeros(6, 6)), {}),
    (Held, (Batch(X, EDGES),), {"scale": torch.tensor(2.0)}),
]


@pytest.mark.parametrize(("build", "args", "kwargs"), CALLS, ids=range(len(CALLS)))
def test_the_first_call_is_captured_as_it_was_made(build, args, kwargs):
    model = build()
    optimizer = BirthDeathOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    out = model(*args, **kwargs)
    (out if isinstance(out, torch.Tensor) else out["logits"]).square().mean().backward()
    optimizer.step()
    assert {p.size for p in optimizer.populations} >= {8} and optimizer.clock == 1


@pytest.mark.parametrize(
    ("build", "example", "length"),
    [
        (Keyword, X, 2),
        (Keyword, {"input_values": X, "labels": torch.zeros(6, 4)}, 2),
        (Keyword, signature(Keyword().forward).bind(X, labels=torch.zeros(6, 4)), 2),
        (Keyword, {"input_values": torch.randn(6, 3, 4), "attention_mask": torch.ones(6, 3)}, 2),
        (Graph, (X, EDGES), 6),
        (Graph, (X, torch.tensor([[0, 1], [1, 0]])), 2),  # the other nodes have no edge
        (Encoder, (torch.randn(6, 2, 4), torch.zeros(6, 6)), 6),
        (Encoder, torch.randn(6, 2, 4), 6),  # each element looks at all others
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), X, 2),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.Softmax(0), nn.Linear(8, 4)), X, 6),
    ],
    ids=range(10),
)
def test_an_input_is_cut_where_that_leaves_the_output_as_it_is(build, example, length):
    torch.manual_seed(0)
    few = shortened(build(), example)
    assert len(tensors_in(few)[0]) == length


def test_keywords_beside_positional_arguments():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x, scale):
            return x + self.g((self.f(x) * scale).relu())

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x, *, scale):
            for block in self.blocks:
                x = block(x, scale=scale)
            return x

    model = Stack()
    example = signature(model.forward).bind(X, scale=torch.tensor(0.5))
    assert [p.size for p in find_populations(model, example)] == [8, 8, 8]
    convert(model, example)
    assert conversion_report(model).particles == 3
    conversion_report(model).stages[0].module.set_tau_([0.3, 0.9, 1.5])
    folded = fold(model)
    torch.testing.assert_close(folded(X, scale=0.5), model(X, scale=0.5))
    assert conversion_report(folded).fold_error < 1e-6


def test_the_captured_batch_is_a_copy():
    model, x = Keyword(), torch.randn(6, 4)
    optimizer = BirthDeathOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model(input_values=x)["logits"].sum().backward()
    x.fill_(torch.nan)  # its memory is used again
    optimizer.step()
    assert [p.size for p in optimizer.populations] == [8]
