"""A step that overflowed moves nothing, and leaves nothing behind."""

import pytest

from tools.faults.overflows import OPTIMIZERS, overflow_and_compare


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steep", [False, True])
def test_overflows_at_random_steps_never_happened(name, steep):
    inner, options = OPTIMIZERS[name]
    # of seed 1 the very first step overflows
    ran, differing = overflow_and_compare(inner, {**options, "steep": steep}, steps=60, seed=1)
    assert ran.skipped >= 6 and ran.motions >= 15
    assert ran.moved == []
    assert differing == []
