"""How `make docs` builds the pages: Sphinx reads Markdown, and generates what the code knows best.

Sphinx, not MkDocs: MkDocs has had no release since 1.6.1 of August 2024, and both Material for
MkDocs (squidfunk/mkdocs-material, issue 8523) and mkdocstrings (issue 807) are in maintenance mode;
Sphinx, MyST and the PyData theme all had releases this autumn.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import _generator  # noqa: E402  (it lies beside this file)

project = "vlp"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
exclude_patterns = ["results/*"]

myst_enable_extensions = ["colon_fence"]
myst_fence_as_directive = ["mermaid"]  # the fence that GitHub draws as well
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # generated pages begin where the docstring begins

html_theme = "pydata_sphinx_theme"
html_title = "vlp"
html_show_sourcelink = False
html_theme_options = {"show_prev_next": True, "navigation_depth": 2, "show_toc_level": 2}


def setup(app):
    """Write the generated pages before Sphinx lists its sources."""
    app.connect("config-inited", lambda app, config: _generator.write(HERE / "generated"))
