"""Neurons: a population whose columns have roles, and the checked way from a user's list of slices to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from torch_meanfield.particles.population import Column, Population, Slice

ROLES = ("in", "own", "out")


@dataclass(frozen=True, eq=False)
class Neurons(Population):
    """n exchangeable hidden units: what each reads with, what it keeps to itself, and what it is read by.

    Permuting the units over all columns leaves the network's function unchanged; permuting fewer does not, which is
    what :func:`torch_meanfield.width.verify` proves.

    Args:
        columns: one :class:`~torch_meanfield.particles.Slice` for each tensor (and dimension) that the units own.
        roles: one for each column: ``"in"`` incoming weights and biases, ``"own"`` gains, statistics and weights
            that stay inside a unit, ``"out"`` outgoing weights.
        owner: the module whose function the exchange leaves unchanged.
        name: shown in errors, reports and logs.

    Raises:
        ValueError: fewer than two units, no outgoing column, an unknown role, roles and columns of unequal number,
            columns that disagree about the number of units, or one that is listed twice.
        TypeError: a column that is not a ``Slice``.

    Example:
        >>> fc1, fc2 = nn.Linear(3, 8), nn.Linear(8, 2)
        >>> columns = [Slice(fc1.weight, 0), Slice(fc1.bias, 0), Slice(fc2.weight, 1)]
        >>> Neurons(columns, ("in", "in", "out"), name="hidden").size
        8

    Source: Rotskoff et al. 2019: a unit is theta = (c, z), outgoing weight and incoming ones.
    """

    roles: tuple[str, ...] = ()

    def __init__(
        self,
        columns: Sequence[Column],
        roles: Sequence[str],
        owner: nn.Module | None = None,
        name: str = "population",
    ) -> None:
        columns = tuple(columns)
        roles = (roles,) if isinstance(roles, str) else tuple(roles)
        for i, column in enumerate(columns):
            if not isinstance(column, Slice):
                raise TypeError(
                    f"{name}: column {i} must be a Slice(tensor, dim), got {type(column).__name__}; units own slices "
                    f"of tensors, whole tensors (Stack) belong to residual blocks"
                )
        super().__init__(columns, owner, name)
        if len(roles) != len(columns):
            raise ValueError(f"{name}: {len(columns)} columns but {len(roles)} roles; give each column one of {ROLES}")
        for i, role in enumerate(roles):
            if role not in ROLES:
                raise ValueError(f"{name}: roles[{i}] must be one of {ROLES}, got {role!r}")
        if "out" not in roles:
            raise ValueError(
                f"{name}: no column has the role 'out'; name the tensor that reads the units (their outgoing weights)"
            )
        if self.size < 2:
            raise ValueError(f"{name}: a population of {self.size} unit has nothing to exchange; leave it out")
        object.__setattr__(self, "roles", roles)

    @staticmethod
    def slices(columns: Sequence[Column]) -> tuple[Slice, ...]:
        """The columns that are slices: all of them, in a population of neurons."""
        return tuple(c for c in columns if isinstance(c, Slice))

    def _of(self, role: str) -> tuple[Slice, ...]:
        return tuple(c for c, r in zip(self.slices(self.columns), self.roles, strict=True) if r == role)

    @property
    def incoming(self) -> tuple[Slice, ...]:
        """Incoming weights and biases."""
        return self._of("in")

    @property
    def own(self) -> tuple[Slice, ...]:
        """What else the units own: gains, running statistics, weights inside a unit."""
        return self._of("own")

    @property
    def outgoing(self) -> tuple[Slice, ...]:
        """Outgoing weights; at least one."""
        return self._of("out")

    def within(self, copy: nn.Module) -> Neurons:
        """The same population inside ``copy``, a module of the owner's structure, see :meth:`Population.within`."""
        return Neurons(super().within(copy).columns, self.roles, owner=copy, name=self.name)


def neurons_from(
    slices: Sequence[Slice | tuple[Tensor, int]], name: str = "population", owner: nn.Module | None = None
) -> Neurons:
    """The population that a user declares as a list: the last slice is the outgoing one, those before are incoming.

    For other roles (several outgoing weights, norm gains and statistics) make a :class:`Neurons` yourself.

    Args:
        slices: at least two of ``(tensor, dim)`` or ``Slice(tensor, dim, outer, inner)``, one for each tensor that
            the units own; all have one length.
        name: shown in errors, reports and logs.
        owner: the module that holds the tensors, if there is one.

    Raises:
        TypeError: ``slices`` is not a list, or an entry is neither a ``Slice`` nor a pair of a tensor and an integer.
        ValueError: fewer than two slices, a dimension out of range, unequal lengths, or a single unit.

    Example:
        >>> z, c = torch.randn(50, 3), torch.zeros(50)
        >>> neurons_from([(z, 0), (c, 0)]).roles
        ('in', 'out')
    """
    if isinstance(slices, (str, Tensor, Slice)) or not isinstance(slices, Sequence):
        raise TypeError(
            f"{name}: expected a list of (tensor, dim) or Slice, one for each tensor that the units own, got "
            f"{type(slices).__name__}"
        )
    columns = [_slice(entry, f"{name}: slice {i}") for i, entry in enumerate(slices)]
    if len(columns) < 2:
        raise ValueError(
            f"{name}: {len(columns)} slices given; a population needs an incoming and an outgoing one (the last)"
        )
    sizes = [c.size for c in columns]
    if len(set(sizes)) > 1:
        raise ValueError(f"{name}: the slices hold {sizes} units; every tensor needs one entry for each unit")
    return Neurons(columns, ("in",) * (len(columns) - 1) + ("out",), owner, name)


def _slice(entry: object, what: str) -> Slice:
    if isinstance(entry, Slice):
        return entry
    if not isinstance(entry, (tuple, list)) or len(entry) != 2:
        raise TypeError(f"{what} must be (tensor, dim) or a Slice, got {entry!r:.80}")
    tensor, dim = entry
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what}: expected a tensor, got {type(tensor).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{what}: dim must be an integer, got {dim!r}")
    try:
        return Slice(tensor, dim)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
