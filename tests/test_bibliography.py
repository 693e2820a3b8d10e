"""Every paper that is cited by author and year has an entry in docs/bibliography.md."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = re.findall(r"^- \*\*(.+?)\.\*\*", (ROOT / "docs" / "bibliography.md").read_text(), flags=re.M)
NAME = r"[A-Z][\w-]*[a-zé]"
CITATION = re.compile(rf"({NAME})((?:, {NAME})*)(?: and {NAME}| et al\.)?,? \(?((?:19|20)\d\d)\b")


def cited():
    """First author and year of each citation in the package, the recipes and the documentation, with the file."""
    files = [p for folder in ("torch_meanfield", "recipes", "docs") for p in (ROOT / folder).rglob("*.py")]
    for path in [*files, *(ROOT / "docs" / "theory").rglob("*.md"), ROOT / "README.md"]:
        text = re.sub(r"\s+", " ", path.read_text())
        for match in CITATION.finditer(text):
            yield match.group(1), match.group(3), path.name


def test_every_citation_has_an_entry():
    found = list(cited())
    assert len(found) > 100
    known = {(re.match(r"\w+", entry).group(), entry[-4:]) for entry in ENTRIES}
    assert {each for each in found if each[:2] not in known} == set()


def test_no_paper_is_cited_by_an_abbreviation():
    short = re.compile(r"\b(L20|R20|Y22|RJBV19)\b")
    sources = [p for p in ROOT.glob("[a-z]*/**/*.*") if p.suffix in (".py", ".md", ".yaml")]
    assert [p for p in sources if p != Path(__file__) and short.search(p.read_text())] == []
