"""No cross-talk: what is trained beside others is what is trained alone, bit for bit."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

from tools.faults.company import as_a_copy, beside_workers, in_another_process, in_threads, made, train
from tools.faults.digits import differences

posix = pytest.mark.skipif(sys.platform == "win32", reason="fork is POSIX")


@pytest.fixture(scope="module")
def alone():
    """Trained alone, by seed."""
    return {seed: train(made(seed), seed) for seed in (0, 1)}


def test_the_training_moves_particles(alone):
    for run in alone.values():
        assert run["motions"].count("resort") >= 5 and run["motions"].count("birth_death") >= 5


def test_two_models_in_two_threads(alone):
    # In a process of its own: once a thread has switched the compiler off for a moment, as every event does, torch 2.15
    # compiles nothing any more in the whole process, and later tests look at what is compiled.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as elsewhere:
        assert differences(elsewhere.submit(in_threads, [0, 1]).result(), alone) == []


@pytest.mark.parametrize(("context", "workers"), [pytest.param("fork", 2, marks=posix), ("spawn", 1)])
def test_beside_data_loader_workers(alone, context, workers):
    assert differences(beside_workers(context, workers), alone[0]) == []


@pytest.mark.parametrize("parted", [as_a_copy, pytest.param(in_another_process, marks=posix)])
def test_a_copy_goes_its_own_way(parted):
    copied, original, (before, after) = parted()
    assert differences(before, after) == []  # while the copy was trained
    assert differences(copied, original) == []
    assert copied["motions"]
