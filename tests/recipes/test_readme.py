"""The README's code runs as it stands there, block after block as a reader would paste it."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_the_code_blocks_run_and_do_what_their_comments_say(capsys):
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.M | re.S)
    assert len(blocks) >= 5
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    out = capsys.readouterr().out
    assert "tensor([1., 2., 3., 4., 5., 6.]" in out
    assert "tensor([1., 1., 1., 1., 1., 1.]" in out
    assert re.search(r"^set_tau .*tensor\(\[1, 2, 0\]\)$", out, flags=re.M)


def test_every_file_and_option_it_names_exists():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (ROOT / path).exists(), path
    for path in set(re.findall(r"recipes/[\w./-]+", TEXT)):
        assert (ROOT / path.rstrip(".")).exists(), path
