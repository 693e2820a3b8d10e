"""Paired differences and their intervals, against figures worked out by hand."""

import math

import pytest

from recipes.grids.paired import paired, told


def test_mean_and_interval_of_three_pairs():
    mean, half_width = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    # Differences 1, 2, 3: standard deviation 1, and Student's t at 97.5 % with 2 degrees of freedom is 4.302653.
    assert half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert told(mean, half_width) == "+2.00 ± 2.48"


def test_one_pair_has_no_interval():
    assert paired([1.0], [2.5]) == (-1.5, math.inf)
    assert told(-1.5, math.inf) == "-1.50"


@pytest.mark.parametrize("sides", [([], []), ([1.0], [1.0, 2.0])])
def test_sides_that_do_not_pair_are_refused(sides):
    with pytest.raises(ValueError, match="one figure for each seed"):
        paired(*sides)
