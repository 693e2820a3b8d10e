"""``convert``: the residual blocks of an existing model become particles, in place."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from torch_meanfield.convert.example_input import example_for
from torch_meanfield.convert.plan import ConversionPlan, Patterns, StagePlan, plan_conversion
from torch_meanfield.convert.report import RECORD, ConversionRecord, ConversionReport, StageReport
from torch_meanfield.convert.sites import Place, Site, attach, descend, detach, site_of
from torch_meanfield.convert.stage import ConvertedStage, stages_of
from torch_meanfield.convert.trial import make_places
from torch_meanfield.depth.tau_axis import check_horizon
from torch_meanfield.observe import fake_quantiser

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    example_input: Any = None,
    *,
    horizon: float | None = None,
    include: Patterns = "*",
    exclude: Patterns = (),
    ignore: Patterns = (),
    foldable: bool = True,
) -> Model:
    r"""Give the residual blocks of ``model`` learnable times, in place.

    .. math:: X^{l} = X^{l-1} + (\tau^l - \tau^{l-1})\, f(X^{l-1}, \theta^l)

    Runs of blocks that can change places become the particles of a stage (:class:`.ConvertedStage`), each with one
    step size for all its residual branches. The step multiplies the branch's last affine layer while that runs, so at
    step 1 (``horizon=None``) outputs and gradients keep every bit. Names, containers, ``forward`` and the entries of
    ``state_dict()`` stay; the entries of tau are added. Checkpoints of the unconverted model load with
    ``strict=True``. After each optimizer step the blocks are re-sorted with their optimizer state, see
    :func:`torch_meanfield.resort_`.

    Found by watching one forward pass of a private copy that shares the parameters, then proven with numbers, block by
    block, in double precision on random weights (not on the meta device). What is in doubt stays as it is;
    :func:`conversion_report` says why.

    Args:
        model: any module that runs eagerly, whatever its attribute names.
        example_input: what it is called with: a tensor, a tuple of arguments, a dict of keywords, or for both
            ``inspect.signature(model.forward).bind(x, mask=mask)``, at the working resolution. ``None``: a timm
            model's configured input size.
        horizon: the last time T of each stage; its steps begin at T over its number of particles. ``None``: that
            number, so that every step is exactly 1.
        include: shell pattern (``fnmatch``), or several, of the qualified names of blocks or of modules that hold them:
            ``"layer3"``, ``"blocks.*"``.
        exclude: likewise, of blocks that stay as they are.
        ignore: names of attributes, or patterns, that may differ between blocks that change places, such as
            ``"layer_idx"``, or of arguments of their ``forward`` by which the model hands them other tensors, such as
            ``"rope"``. They stay at the place. Integers that count the blocks need not be named: they are tried with
            numbers.
        foldable: ``False`` also converts branches that no parameter scales (an activation other than ReLU stands
            behind the last affine layer): the output of the branch's last module is multiplied at run time, and
            :func:`torch_meanfield.fold` refuses.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing in it can be converted (with the reasons), it is converted already, a pattern matches
            no block, the horizon is not positive, or there is no example. The model is untouched then.

    Source: Lu et al. 2020, eq. (15) and Algorithm 1. The scaled layer is exact: a branch that ends in an affine map is
    multiplied by s if weight and bias of that map are.

    Example:
        >>> from torch_meanfield import conversion_report, convert
        >>> from torch_meanfield.convert.small_network import residual_network
        >>> model = convert(residual_network(), torch.randn(2, 4))
        >>> print(conversion_report(model))
        ResidualNetwork: 1 stages, 3 particles, 3 branches
          mean_field_blocks: 3 particles, blocks.0 to blocks.2, 1 residual branch in each
    """
    _check_unconverted(model)
    check_horizon(horizon, 1)
    example = example_for(model, example_input, "convert")
    plan = plan_conversion(model, example, include=include, exclude=exclude, ignore=ignore, foldable=foldable)
    if not plan.stages:
        reasons = "".join(f"\n  {f}" for f in plan.fixed) or "\n  no module adds a branch to its own input"
        hint = "\n  (foldable=False also converts branches that no parameter scales)" if foldable else ""
        hint = hint if any(not f.foldable for f in plan.fixed) else ""
        raise ValueError(
            f"convert: {type(model).__name__} has no residual blocks that can change places:{reasons}{hint}"
        )
    _carry_out(model, plan, horizon, example)
    return model


def _check_unconverted(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    names = list(stages_of(model)) + [n for n, m in model.named_modules() if site_of(m) is not None]
    if names:
        raise ValueError(
            f"convert: {type(model).__name__} is converted already (at {names[0]!r}); fold(model) gives a plain copy"
        )
    quantiser = fake_quantiser(model)
    if quantiser is not None:
        raise ValueError(
            f"convert: {type(model).__name__} rounds by a fake quantiser, {quantiser}, which computes in single "
            f"precision; what is converted is proven in double. Convert and train before quantisation-aware training, "
            f"then fold(model)"
        )


def _carry_out(model: nn.Module, plan: ConversionPlan, horizon: float | None, example: Any) -> None:
    """Make the stages; if anything fails, undo what was done."""
    modules = dict(model.named_modules())
    added: list[tuple[nn.Module, str]] = []
    attached: list[nn.Module] = []
    reports = []
    try:
        for p in plan.stages:
            blocks = [[modules[part] for b in particle for part in b.parts] for particle in p.particles]
            carries = any(b.tables for b in p.particles[0])
            stage = ConvertedStage(blocks, check_horizon(horizon, len(blocks)), carries=carries)
            stage.train(model.training)
            host = modules[p.host]
            name = _free_name(host, p.around)
            host.add_module(name, stage)
            added.append((host, name))
            for slot, particle in enumerate(p.particles):
                parts = [(part, b) for b in particle for part in b.parts]
                for member, (part, b) in enumerate(parts):
                    block = modules[part]
                    scaled = make_places(b, block, slot, member) if part == b.name else []
                    places = {q.path: q for q in scaled}
                    acting = tuple(q for q in scaled if q.acts)
                    places.setdefault("", Place(slot, member, "", type(block))).inside = acting
                    for place in places.values():
                        module: nn.Module = descend(block, place.path)
                        attach(module, Site(stage, place))
                        attached.append(module)
                    stage.places[slot, member] = acting
            reports.append(_report(p, f"{p.host}.{name}".lstrip(".")))
        report = ConversionReport(type(model).__name__, tuple(reports), tuple(plan.fixed))
        model.__dict__[RECORD] = ConversionRecord(report, example)
    except BaseException:
        for module in attached:
            detach(module)
        for host, name in added:
            delattr(host, name)
        raise


def _report(plan: StagePlan, name: str) -> StageReport:
    blocks = [b for particle in plan.particles for b in particle]
    return StageReport(
        name=name,
        particles=tuple(tuple(part for b in particle for part in b.parts) for particle in plan.particles),
        branches=sum(len(b.branches) for b in plan.particles[0]),
        parameters=tuple((f"{b.name}.{s.path}", s.power) for b in blocks for s in b.scaled if s.name),
        foldable=all(b.foldable for b in blocks),
        checked=plan.checked,
    )


def _free_name(host: nn.Module, around: str) -> str:
    name = "mean_field_" + (around.replace(".", "_") or "blocks")
    while hasattr(host, name):
        name += "_"
    return name
