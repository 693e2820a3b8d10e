"""Links of the pages that lead out of docs/: a file is offered for download, a folder is shown in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def rewrite(text: str, folder: Path, source: str) -> str:
    """The links of one page, which lies in ``folder``; images and links within docs/ stay as they are."""

    def replaced(match: re.Match[str]) -> str:
        label, path = match.groups()
        target = (folder / path).resolve()
        if target.is_relative_to(ROOT / "docs") or not target.is_relative_to(ROOT):
            return match[0]
        if target.is_dir():
            return f"[{label}]({source}/tree/main/{target.relative_to(ROOT)})"
        return f"{{download}}`{label.strip('`')} <{path}>`"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+)\)", replaced, text)


def setup(app: Any) -> dict[str, bool]:
    def read(app: Any, docname: str, content: list[str]) -> None:
        path = Path(app.env.doc2path(docname))
        if path.suffix == ".md":
            content[0] = rewrite(content[0], path.parent, app.config.html_theme_options["source_repository"])

    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
