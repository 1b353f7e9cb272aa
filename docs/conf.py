"""Configuration of the documentation."""

import normlab

project = "normlab"
release = version = normlab.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"normlab {release}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True


def escape(app, what, name, obj, options, lines):
    """Docstrings are written for people: stars and bars in formulas are no markup."""
    for i, line in enumerate(lines):
        if ">>>" not in line:
            parts = line.split("``")
            parts[::2] = [p.replace("*", r"\*").replace("|", r"\|") for p in parts[::2]]
            lines[i] = "``".join(parts)


def setup(app):
    """Escape before napoleon, which adds markup of its own, reads the docstrings."""
    app.connect("autodoc-process-docstring", escape, priority=400)
