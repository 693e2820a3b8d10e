"""``BirthDeathOptimizer``: any optimizer, with birth and death of neurons."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torch_meanfield._torch import init_optimizer_hooks, patch_step
from torch_meanfield.particles.neurons import Neurons
from torch_meanfield.particles.no_compile import eagerly
from torch_meanfield.particles.population import Slice
from torch_meanfield.particles.unmoved import ask
from torch_meanfield.width.births.reinject import Initializer
from torch_meanfield.width.births.rule import BirthRule
from torch_meanfield.width.draws import Draws
from torch_meanfield.width.optimizer import checkpoint
from torch_meanfield.width.optimizer.declared import asked, declared
from torch_meanfield.width.optimizer.discovery import Glimpse, discovered
from torch_meanfield.width.optimizer.settings import Births, Scheme, Settings
from torch_meanfield.width.optimizer.sharing import SharingOptimizer, with_own_hooks
from torch_meanfield.width.turnover.blocks import Blocks
from torch_meanfield.width.turnover.decide import Evidence, TurnoverRule
from torch_meanfield.width.turnover.dynamics import Dynamics
from torch_meanfield.width.turnover.event import Event, Events
from torch_meanfield.width.turnover.plastic import Plastic

Declared = Neurons | nn.Module | Sequence[Slice | tuple[Tensor, int]]


class BirthDeathOptimizer(SharingOptimizer):
    r"""Wrap an optimizer: it goes on stepping as it did, and every ``every`` steps units are killed and born.

    The potential of a unit, :math:`V_i = \sum_k a_{ik}\,\partial E/\partial a_{ik}` over its outgoing weights, is
    read at each step from gradients that exist anyway and averaged over steps. At an event, in each population,

    - ``scheme="standing_out"`` (the default) replaces dormant units, which reach nothing (ReLUs that never fire), and
      units whose potential stands out of its own noise and without which the loss is expected to fall: see
      :func:`.standing_out` and :func:`.removal`. The loss is taken for a negative log-likelihood (or a mean square) of
      natural scale. Where clipping cuts gradients to a tenth at most steps, the margin that protects good units is
      used up, and ``rate=0`` is the safe choice.
    - ``scheme="plastic"``, for networks that must go on learning while the data or the task change, replaces
      units that have fallen silent, for ``dead_after`` samples and longer than is their way: see :class:`.Plastic`.
    - ``scheme="exact"`` is the theory, (34) and (37):
      :math:`\partial_t\mu = \nabla\cdot(\mu\nabla V) - \alpha (V - \bar V)\mu` with alpha = ``rate``. Time is the
      sum of the learning rates. To check theory with, on potentials that are (nearly) exact: rates proportional to V,
      read off a mini-batch, are mostly noise and destroy good units.
    - a :class:`.TurnoverRule` of your own.

    What takes a vacant place:

    - ``births="reinject"``: a unit drawn anew from the layer's own initialiser, optimizer state fresh, outgoing weights
      0, so that the function stays as it was; with ``steep`` it is placed where the loss is: see :class:`.Steep`.
    - ``births="typical"``: the same, at the size of the living or of He et al.'s initialiser: :class:`.Typical`.
    - ``births="split"``: half of another unit, slightly moved. ``births="clone"``: an exact duplicate, as published.
    - a :class:`.BirthRule` of your own.

    The residual blocks of a mean-field layer with learnable times are a population too: a dead block leaves its time
    to a neighbour, and a clone shares its parent's interval (the function changes by :math:`O(\Delta\tau^2)`).

    Everything stays on the device, with one read per event and none on other steps (but whether a ``GradScaler`` over a
    fused optimizer overflowed, which torch reads for others). A step that was skipped has never been: nothing of it is
    remembered. Nothing happens on gradients that are not finite, and in populations with a frozen parameter.

    Args:
        optimizer: any ``torch.optim.Optimizer``. ``param_groups``, ``state`` and ``defaults`` are shared with it.
        model: the module whose units these are, the one that is called. Needed by ``populations="auto"``; for
            declared populations it finds the layers' initialisers and lets averaged copies follow.
        populations: ``"auto"``: found by :func:`~torch_meanfield.width.find_populations` and proven; or a population,
            or a list of them, each a :class:`~torch_meanfield.width.Neurons`, a list of ``(tensor, dim)`` whose
            last entry is the outgoing weights, or a mean-field layer, whose blocks are meant.
        rate: ``standing_out``: the largest share of a population replaced as harmful in one event, rounded down, so
            that a handful of units (attention heads) loses none that works, and 0 replaces none, dead ones neither;
            ``exact``: alpha; ``plastic``: of no weight. 0 (with ``reinject=0``) gives the wrapped optimizer bit for
            bit, under ``plastic`` too.
        every: steps from one event to the next; ``None``: 5 under ``plastic``, else 200. (Under ``standing_out``, no
            potential can stand out of 10 steps or fewer by three standard errors: only dormant units are replaced.)
        births: ``"reinject"``, ``"typical"``, ``"split"``, ``"clone"`` or a rule; ``None``: ``"clone"`` under
            ``exact``, ``"typical"`` under ``plastic``, else ``"reinject"``.
        scheme: ``"standing_out"``, ``"exact"``, ``"plastic"`` or a rule.
        reinject: besides, the share of the units that are replaced at each event, at random, by units drawn anew with
            outgoing weights 0: the measure of full support that global convergence asks for.
        steep: whether newborn units are placed where the potential is steep, where that can be seen.
        mass: outgoing weights of a unit born in a harmful one's place if all rows agreed, in medians of the population;
            0: none, every birth leaves the function as it is.
        candidates: draws of which the steepest are taken; fewer in wide layers, so that an event stays cheap.
        window: steps over which potentials are averaged; ``None``: half of ``every``, 1 under ``exact``, 100 under
            ``plastic``, which does not decide by them.
        threshold: how far a potential must stand out, in standard errors of its own average.
        batch_size: samples whose mean a step's gradient is, over all ranks; ``None``: counted at a layer of ``model``,
            unless that is compiled or run under ``vmap``. Without either a warning says what it costs.
        dead_after: under ``plastic``, the least number of samples that have not reached a unit when it is replaced.
        max_share: under ``plastic``, the largest share of a population that is replaced at once, unless all of it is
            dormant.
        moment_share: second moments that the optimizer keeps (Adam's ``exp_avg_sq``) begin at this share of their mean
            for newborn units, other state as it began for the layer; ``None``: 0.003 under ``plastic``, else 0.01.
        initializer: ``initializer(rows, generator)`` fills one tensor for each incoming column of a population in
            place, newborn units along the column's dimension; ``None``: see :func:`.initialisers_of`.
        example_input: an input of ``model`` for ``"auto"``; ``None``: the first one it is called with. Without it a
            run resumes inexactly from a checkpoint of the 40 steps before an event, while the landscape is recorded.
        seed: of the generator, which must be alike on all data-parallel ranks.

    Attributes:
        enabled: set it to ``False`` to let the population rest, as for the last part of a training.
        clock: optimizer steps seen.

    Raises:
        TypeError, ValueError: naming the argument, before anything is changed: see :class:`.Settings`,
            :func:`.neurons_from`; a parameter that the optimizer does not own; units whose weights are computed from
            others (:mod:`.reparametrised`); blocks tied to other modules; ``"auto"`` without a model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
        >>> optimizer = BirthDeathOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1), model,
        ...     populations=[(model[0].weight, 0), (model[0].bias, 0), (model[2].weight, 1)],
        ... )
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> isinstance(optimizer, torch.optim.Optimizer), optimizer.clock
        (True, 1)

    Source: Rotskoff, Jelassi, Bruna, Vanden-Eijnden 2019 (arXiv:1902.01843); Rotskoff 2020, (33)-(37).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        *,
        populations: Literal["auto"] | Declared | Sequence[Declared] = "auto",
        rate: float = 0.1,
        every: int | None = None,
        births: Births | BirthRule | None = None,
        scheme: Scheme | TurnoverRule = "standing_out",
        reinject: float = 0.0,
        steep: bool = True,
        mass: float = 2.0,
        candidates: int = 1024,
        window: float | None = None,
        threshold: float = 3.0,
        batch_size: int | None = None,
        dead_after: int = Plastic.dead_after,
        max_share: float = Plastic.max_share,
        moment_share: float | None = None,
        initializer: Initializer | None = None,
        example_input: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer)
        more = (batch_size, dead_after, max_share, moment_share)
        self.settings = Settings(
            rate, every, births, scheme, reinject, bool(steep), mass, candidates, window, threshold, *more
        )
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be callable or None, got {type(initializer).__name__}")
        self._rules = self.settings.rules(initializer)
        self.clock = 0
        self.enabled = True
        self._model = model
        self._draws = Draws(torch.Generator().manual_seed(seed))
        self._callbacks: OrderedDict[int, Callable[[Event], None]] = OrderedDict()
        self._dynamics: Dynamics | None = None
        self._glimpse: Glimpse | None = None
        self._pending: dict[str, Any] | None = None  # a state dict loaded before the populations were known
        self._checked = False
        if isinstance(populations, str):
            if populations != "auto":
                raise ValueError(f"populations must be 'auto' or a declaration of populations, got {populations!r}")
            if model is None:
                raise ValueError(
                    "populations='auto' needs model=, the module whose units are to be found; or declare them"
                )
            if example_input is not None:
                self._settle(discovered(model, example_input, optimizer))
            elif self.settings.active:
                self._glimpse = Glimpse(model)
        else:
            self._settle(declared(populations, model, optimizer))

    @property
    def populations(self) -> list[Neurons | Blocks]:
        """The populations that are acted on; empty until the first step if they are found from the first input."""
        return [each.population for each in self._dynamics.tracked] if self._dynamics else []

    def potentials(self) -> dict[str, Tensor]:
        """The averaged potential of every unit, by name of its population; shape ``(n,)``, 0 where nothing was seen."""
        return self._of_each(lambda seen: seen.mean)

    def ages(self) -> dict[str, Tensor]:
        """Over how many steps every unit has been watched since its birth, by name of its population; ``(n,)``."""
        return self._of_each(lambda seen: seen.age.clone())

    def dormant(self) -> dict[str, Tensor]:
        """Which units the scheme takes for dormant, bool ``(n,)`` by population; the mean is the dormant share."""
        return self._of_each(self._rules[0].dormant)

    def _of_each(self, read: Callable[[Evidence], Tensor]) -> dict[str, Tensor]:
        if self._dynamics is None:
            return {}
        size = self._dynamics.events.batch_size
        return {each.name: read(each.evidence(size)) for each in self._dynamics.tracked}

    def _settle(self, populations: list[Neurons | Blocks]) -> Dynamics:
        settings = self.settings
        events = Events(*self._rules, settings.reinject, self._draws, settings.moment_share, settings)
        times: dict[str, Any] = {"every": settings.steps_between, "window": settings.window or 1.0}
        dynamics = Dynamics(populations, self._model, events, **times, batch_size=settings.batch_size)
        if self._pending is not None:
            checkpoint.check(self._pending, dynamics)
            checkpoint.unpack_(self._pending, dynamics)
            self._pending = None
        self._dynamics = dynamics
        dynamics.watch(self.clock)
        return dynamics

    # -- stepping ----------------------------------------------------------------------------------------------

    @with_own_hooks
    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the wrapped optimizer; every ``every``-th time, let units die and be born.

        Args:
            closure: passed on; it is called as often as the wrapped optimizer calls it.
            **kwargs: passed on.

        Raises:
            TypeError: the optimizer keeps state that cannot be divided among the units (factored, 8-bit, LBFGS).
            ValueError: a parameter of a population was replaced in the model since it was wrapped.
        """
        if not self.settings.active or not self.enabled:
            return self.optimizer.step(closure, **kwargs) if closure is not None else self.optimizer.step(**kwargs)
        if self._overflowed():
            return None
        if closure is None:
            seen = self._read()
            out = self.optimizer.step(**kwargs)
        else:
            reads: list[bool] = []

            def watched() -> Any:
                loss = closure()
                if not reads:  # a line search calls it again at other places
                    reads.append(self._read())
                return loss

            out = self.optimizer.step(watched, **kwargs)
            seen = any(reads)
        if seen:
            self._after()
        return out

    def _overflowed(self) -> bool:
        """Whether a ``GradScaler`` has found this step to overflow and leaves it to a fused optimizer to skip it.

        Then that one is not called: it would make its state all the same, SGD's momentum out of unwritten memory.
        """
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf.any()):
            return False
        self._forget_step()
        return True

    @eagerly
    def _read(self) -> bool:
        """Take in this step's potentials; whether there was a step to see."""
        if self._glimpse is not None:
            example, batches, self._glimpse = self._glimpse.take(), self._glimpse.batches, None
            assert self._model is not None
            dynamics = self._settle(discovered(self._model, example, self.optimizer, shorten=True))
            batches.hand_over(dynamics.batch, self._model, example)
        # Checkpointing makes optimizers initialise by a step with learning rate 0: no time passes in it.
        rates = [group.get("lr", 1.0) for group in self.optimizer.param_groups]
        on_tensors = [lr for lr in rates if isinstance(lr, Tensor)]
        if self._dynamics is None or not (on_tensors or any(rates)):
            return False
        if on_tensors and any(lr.is_cpu and not lr.any() for lr in on_tensors):
            return False
        self._dynamics.read(self.optimizer)
        return True

    @eagerly
    def _after(self) -> None:
        dynamics = self._dynamics
        assert dynamics is not None
        if not self._checked:
            ask(self.optimizer, asked(self.populations, self._model))
            dynamics.check_state(self.optimizer)
            self._checked = True
        self.clock += 1
        for event in dynamics.step(self.optimizer, self.clock):
            for callback in list(self._callbacks.values()):
                callback(event)
        dynamics.watch(self.clock)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See :meth:`torch.optim.Optimizer.zero_grad`."""
        self._forget_step()
        super().zero_grad(set_to_none)

    def _forget_step(self) -> None:
        if watching := self._dynamics or self._glimpse:
            watching.forget_step()

    def register_event_hook(self, callback: Callable[[Event], None]) -> RemovableHandle:
        """Call ``callback(event)`` after each event that changed something; see :class:`Event`.

        Raises:
            TypeError: ``callback`` is not callable.
        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, got {type(callback).__name__}")
        handle = RemovableHandle(self._callbacks)
        self._callbacks[handle.id] = callback
        return handle

    # -- checkpoints -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the optimizer; populations stay as they are."""
        super().add_param_group(param_group)
        self._checked = False

    def _own_state(self) -> dict[str, Any]:
        return {checkpoint.KEY: self._packed()}

    def birth_death_state(self) -> dict[str, Any]:
        """The entry ``"birth_death"`` of :meth:`state_dict` with the parts of all ranks; call it on all of them.

        Any number of ranks can go on from it. To be saved with ``torch.save`` beside what the tools of
        ``torch.distributed.checkpoint`` take of this optimizer.
        """
        return checkpoint.pack_all(self._packed()) if self._pending is None else self._pending

    def load_birth_death_state(self, state: dict[str, Any]) -> None:
        """Load :meth:`birth_death_state`, after the wrapped optimizer.

        Raises:
            ValueError: it is damaged or of another model; the entry is named. Nothing has been loaded then.
        """
        checkpoint.check_entry(state)
        if self._dynamics is not None:
            checkpoint.check(state, self._dynamics)
        self._unpack(state)

    def _packed(self) -> dict[str, Any]:
        if self._pending is not None:
            return self._pending
        return checkpoint.pack(self._dynamics, self.clock, self._draws.generator)

    def _unpack(self, ours: dict[str, Any]) -> None:
        self.clock = int(ours["clock"])
        self._draws.generator.set_state(ours["generator"].cpu())
        if self._dynamics is None:
            self._pending = ours
        else:
            checkpoint.unpack_(ours, self._dynamics)

    def _take_own(self, state_dict: dict[str, Any]) -> Callable[[], None]:
        bare = checkpoint.KEY not in state_dict
        ours = state_dict.pop(checkpoint.KEY, None)
        if not bare:
            checkpoint.check_entry(ours)
            if self._dynamics is not None:
                checkpoint.check(ours, self._dynamics)

        def load() -> None:
            self._checked = False
            if not bare:
                self._unpack(ours)
                return
            self.clock = 0
            if self._dynamics is not None:
                self._dynamics.begin_anew()

        return load

    def __getstate__(self) -> dict[str, Any]:
        left_out = {"_callbacks", "step", "_opt_called", "_glimpse"}
        out = {k: v for k, v in self.__dict__.items() if k not in left_out and not k.startswith("_optimizer_")}
        return {**out, "_glimpsing": self._glimpse is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        glimpsing = state.pop("_glimpsing")
        self.__dict__.update(state)
        self._callbacks = OrderedDict()
        self._glimpse = Glimpse(self._model) if glimpsing and self._model is not None else None
        if self._dynamics is not None:
            self._dynamics.resume()
        init_optimizer_hooks(self)
        patch_step(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.populations)} populations, {self.settings}) around {self.optimizer!r}"
