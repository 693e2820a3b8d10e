"""The code of the README and of the pages runs as it stands there, block after block as a reader would paste it."""

import configparser
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
# docs/extending.md is run by tests/test_layout.py, docs/pruning.md by tests/pruning/; in docs/theory/README.md the
# reader's model is meant.
ELSEWHERE = {"docs/extending.md", "docs/pruning.md", "docs/theory/README.md"}
NEEDS = {"docs/loops.md": ("lightning", "accelerate"), "docs/converting.md": ("timm",), "README.md": ("timm",)}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)


PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]
WITH_CODE = [page for page in PAGES if page not in ELSEWHERE and blocks(page)]


def setting(option: str) -> str:
    """An entry of ``project_urls`` in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return dict(re.findall(r"^(\w+) = (.*)$", config["metadata"]["project_urls"], flags=re.M))[option]


def run(page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """What the blocks of ``page`` print."""
    for name in NEEDS.get(page, ()):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, page, "exec"), scope)
    return capsys.readouterr().out


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_blocks_run(page, capsys, monkeypatch, tmp_path):
    run(page, capsys, monkeypatch, tmp_path)


def test_the_pages_that_the_readme_was_divided_into_have_code():
    assert {"order", "start", "converting", "loops", "averages", "checkpoints", "plasticity"} <= {
        Path(page).stem for page in WITH_CODE
    }
    assert len(blocks("README.md")) >= 3


def test_the_comments_in_the_page_on_order_say_what_is_printed(capsys, monkeypatch, tmp_path):
    out = run("docs/order.md", capsys, monkeypatch, tmp_path)
    assert "tensor([1., 2., 3., 4., 5., 6.]" in out
    assert "tensor([1., 1., 1., 1., 1., 1.]" in out
    assert re.search(r"^set_tau .*tensor\(\[1, 2, 0\]\)$", out, flags=re.M)


def test_the_readme_is_short():
    assert len(README.encode()) <= 7168


def test_every_link_of_the_readme_is_absolute_and_those_to_the_repository_lead_to_files():
    source = setting("Source")
    raw = source.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links and all(link.startswith("https://") for link in links)
    ours = [link for link in links if "torch-meanfield" in link]
    assert len(ours) > 10
    for link in ours:
        path = link.removeprefix(f"{source}/blob/main/").removeprefix(raw)
        assert path != link and (ROOT / path).exists(), link


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_every_link_of_a_page_leads_somewhere(page):

    for path in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    for path in set(re.findall(r"(?:recipes|benchmarks|tools)/[\w/]+\.(?:py|sh|yaml)", (ROOT / page).read_text())):
        assert (ROOT / path).exists(), path
