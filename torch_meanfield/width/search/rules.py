"""The rules by which labels pass through torch functions, by the names of the functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch_meanfield.observe import Call
from torch_meanfield.width.search.labels import Ledger

R = TypeVar("R", bound=Callable[[Ledger, Call], Any])


@dataclass(frozen=True)
class Rule:
    """How labels pass through a function, and whether a call of it makes new units, as a layer does."""

    follow: Callable[[Ledger, Call], Any]
    makes_units: Callable[[Call], bool]


RULES: dict[str, Rule] = {}


def rule_for(*names: str, makes_units: bool | Callable[[Call], bool] = False) -> Callable[[R], R]:
    """A decorator: :func:`torch_meanfield.width.find_populations` follows units through functions by this rule.

    The rule is called as ``rule(ledger, call)`` after the function has run and returns the tracks of its result
    (``ledger.state(tensor).tracks`` are those of an argument), a list of tracks for a function with several results,
    or ``None`` where it cannot tell: then the units that enter are refused. A wrong rule makes wrong candidates, which
    the proof refuses. :func:`~torch_meanfield.width.search.product` and
    :func:`~torch_meanfield.width.search.elementwise` are what most rules consist of.

    Args:
        names: ``__name__`` of each function, as :class:`torch_meanfield.observe.Call` reports it. Its in-place variant
            (``name_``) and its default overload (``name.default``, an operator of ``torch.library``) are included. A
            later rule for a name replaces the earlier one.
        makes_units: Whether the output channels are new units (layers), or a function of the call that says so.

    Example:
        A layer whose function torch treats as one, so that nothing inside it is seen:

        >>> from torch_meanfield.width.search import find_populations, product, rule_for
        >>> @torch.overrides.wrap_torch_function(lambda x, weight: (x, weight))
        ... def sign_linear(x, weight):
        ...     return x @ weight.sign().T
        >>> class SignLinear(nn.Linear):
        ...     def forward(self, x):
        ...         return sign_linear(x, self.weight)
        >>> net = nn.Sequential(SignLinear(3, 8), nn.Tanh(), nn.Dropout(), SignLinear(8, 2))
        >>> @rule_for("sign_linear", makes_units=True)
        ... def follow_sign_linear(ledger, call):
        ...     x, weight = call.args
        ...     return product(ledger, "bi,oi->bo", x, weight, weight=True)
        >>> print(find_populations(net, torch.randn(1, 3)))
        1 populations, 0 candidates refused
          0.weight: 8 units, 2 columns
    """

    def register(follow: R) -> R:
        says = makes_units if callable(makes_units) else lambda call: bool(makes_units)
        RULES.update(dict.fromkeys(names, Rule(follow, says)))
        return follow

    return register
