"""Damaged and hostile checkpoints: loaded whole, or refused by name with nothing changed; and nothing is executed."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest
import torch

from recipes.errors import BadInput
from recipes.images.cli import RecipeCLI
from tools.faults import hostile_files
from tools.faults.hostile_files import SUBJECTS, Executed, attempt_file, soak
from torch_meanfield import MeanFieldResNet, MeanFieldSequential
from torch_meanfield.particles import load_whole_

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_damaged_state_dict_is_loaded_whole_or_refused_by_name(name: str) -> None:
    tries, survived, failures = soak(10, seed=7, subjects={name: SUBJECTS[name]})
    assert survived == tries, "\n".join(failures)


def test_the_harness_notices_a_load_in_part() -> None:
    """torch's own method copies what fits before it raises."""

    def careless() -> hostile_files.Subject:
        subject, model = hostile_files.a_resnet(), MeanFieldResNet(14, 3)
        subject.state, subject.load = model.state_dict, lambda s: torch.nn.Module.load_state_dict(model, s)
        return subject

    failures = soak(12, seed=0, subjects={"careless": careless})[2]
    assert any("something has changed" in line for line in failures)


def test_the_harness_notices_what_is_swallowed_and_what_is_not_named() -> None:
    def swallowing() -> hostile_files.Subject:
        subject = hostile_files.a_layer()
        subject.load = lambda state: None
        return subject

    def mumbling() -> hostile_files.Subject:
        subject = hostile_files.a_layer()

        def load(state: object) -> None:
            raise ValueError("bad file")

        subject.load = load
        return subject

    assert any("loaded, but" in line for line in soak(10, subjects={"swallowing": swallowing})[2])
    assert any("without naming" in line for line in soak(10, subjects={"mumbling": mumbling})[2])


@pytest.mark.parametrize("seed", range(14))
def test_a_hostile_file_is_refused_by_its_name_and_not_executed(seed: int) -> None:
    kind, wrong = attempt_file(random.Random(seed))
    assert not wrong, f"{kind}: {wrong}"


def test_the_hostile_pickle_would_run_if_it_were_let(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"net.stem.weight": hostile_files._Hostile()}}, path)
    with pytest.raises(Executed):
        torch.load(path, weights_only=False)
    with pytest.raises(BadInput, match="not a readable checkpoint"):
        RecipeCLI._read_checkpoint(str(path))


NEVER = {"pickle.load", "pickle.loads", "joblib.load", "dill.load", "yaml.load", "yaml.unsafe_load", "eval", "exec"}


def _calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(n.func), n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]


def _sources() -> list[Path]:
    everything = [p for folder in ("torch_meanfield", "recipes", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    return sorted([*everything, *(ROOT / "tools").glob("*.py")])  # tools/faults/ unpickles what it has just pickled


def _unsafe(path: Path) -> list[str]:
    found = []
    for name, call in _calls(path):
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name in NEVER:
            found.append(f"{path.name}:{call.lineno}: {name}")
        if name in ("torch.load", "torch.jit.load", "torch.export.load") and keywords.get("weights_only") != "True":
            found.append(f"{path.name}:{call.lineno}: {name} without weights_only=True")
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle") not in (None, "False"):
            found.append(f"{path.name}:{call.lineno}: {name} with allow_pickle")
        if name.endswith(("load_from_checkpoint", "torch.hub.load")) and keywords.get("weights_only") != "True":
            found.append(f"{path.name}:{call.lineno}: {name} without weights_only=True")
    return found


def test_nothing_in_the_sources_unpickles_code() -> None:
    sources = _sources()
    assert len(sources) > 100
    assert any(name == "torch.load" for path in sources for name, _ in _calls(path))  # there is something to look at
    assert [line for path in sources for line in _unsafe(path)] == []


@pytest.mark.parametrize("line", ["torch.load(f)", "torch.load(f, weights_only=False)", "pickle.loads(b)", "eval(s)"])
def test_the_search_for_unsafe_calls_finds_them(line: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(f"import torch\n{line}\n")
    assert len(_unsafe(path)) == 1


def test_a_refused_load_leaves_attributes_and_tensors_of_every_module_as_they_were() -> None:
    layer = MeanFieldSequential(*(torch.nn.Linear(2, 2) for _ in range(3)), learn_tau=False)
    assert layer.tau_axis.unit_steps
    model = torch.nn.Sequential(layer, torch.nn.Linear(2, 1))
    before, tensors = hostile_files.fingerprint(model.state_dict()), dict(model.state_dict(keep_vars=True))
    state = {**model.state_dict(), "0.tau_axis.anchor": torch.tensor([3.0, 2.0, 1.0])}
    state["1.weight"] = torch.zeros(5)
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"1\.weight"):
            load_whole_(model, state, assign=assign)
        assert hostile_files.fingerprint(model.state_dict()) == before and layer.tau_axis.unit_steps
        assert all(model.state_dict(keep_vars=True)[k] is t for k, t in tensors.items())


def test_a_load_that_leaves_keys_out_is_still_possible() -> None:
    model = MeanFieldResNet(8, 2)
    state = {k: v + 1 for k, v in model.state_dict().items() if not k.startswith("fc.")}
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        model.load_state_dict(state)
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == ["fc.weight", "fc.bias"] and torch.equal(model.stem.weight, state["stem.weight"])
