"""Sphinx: the Markdown pages of this folder, the API from the docstrings, the tutorials executed (`make docs`)."""

from __future__ import annotations

import configparser
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import torch_meanfield  # noqa: E402  # the checkout's

_metadata = configparser.ConfigParser()
_metadata.read(HERE.parent / "setup.cfg")
SOURCE = dict(re.findall(r"^(\w+) = (.*)$", _metadata["metadata"]["project_urls"], flags=re.M))["Source"]

project = "torch-meanfield"
author = _metadata["metadata"]["author"]
copyright = author  # the name that Sphinx reads
release = version = torch_meanfield.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax is part of the site: pages and search work without a network
    "sphinx_gallery.gen_gallery",
    "sphinx_copybutton",
    "myst_parser",
    "room_map",
    "outside",
]
exclude_patterns = ["_build", "_ext", "tutorials", "auto_tutorials/*.ipynb", "auto_tutorials/*.py"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
suppress_warnings = ["config.cache"]  # the gallery's options hold functions

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "auto_tutorials",
    "filename_pattern": r"/t\d_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "abort_on_example_error": True,
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"torch-meanfield {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"source_repository": SOURCE, "source_branch": "main", "source_directory": "docs/"}
linkcheck_ignore = [re.escape(SOURCE)]  # `python tools/release.py address` asks for it
