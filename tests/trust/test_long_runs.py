"""Nothing accumulates in 600 steps with an event in every fourth; ``tools/soak.py`` takes 100,000."""

from tools.faults.long_runs import long_run


def test_a_long_run_leaves_everything_as_it_was():
    figures = long_run(600)
    assert figures.motions > 120
    assert figures.populations[0] == figures.populations[1] == [24, 4, 4]
    assert figures.counted[0] == figures.counted[1]
    assert figures.counted[0]["_forward_hooks"] >= 3  # the landscape before the next event is being recorded
