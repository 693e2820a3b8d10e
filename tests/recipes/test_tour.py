"""The tour runs from top to bottom, says what its comments say, and draws its pictures."""

import os
import re
import subprocess
import sys
from pathlib import Path

TOUR = Path(__file__).resolve().parents[2] / "recipes" / "tour.py"


def test_the_tour_from_top_to_bottom(tmp_path):
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, str(TOUR)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout
    resorts = int(re.search(r"(\d+) re-sorts", told).group(1))
    assert resorts > 0
    assert re.search(r"^Adam, wrapped: 128 of 128 units alive", told, flags=re.M)
    assert int(re.search(r"^Adam: (\d+) of 128", told, flags=re.M).group(1)) < 70
    learnt, folded = map(float, re.search(r"test error ([\d.]+) %; folded ([\d.]+) %", told).groups())
    assert learnt == folded < 50
    pictures = sorted((tmp_path / "runs" / "tour").glob("*.png"))
    assert [path.name for path in pictures] == ["1-layer.png", "2-times.png", "3-fold.png", "4-births.png"]
    assert all(path.stat().st_size > 10_000 for path in pictures)
