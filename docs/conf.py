"""Configuration of the documentation."""

from pathlib import Path

import normlab
from normlab.discovery import catalogue

project = "normlab"
release = version = normlab.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"normlab {release}"
exclude_patterns = ["_build", "_catalogue.md"]
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


def write(app, name, text):
    """Write a source file; one that says the same stays, so that it is not read anew."""
    path = Path(app.srcdir, name)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_methods(app):
    """Write the page of all methods from their cards, so that none is left out."""
    lines = ["# Methods", ""]
    for site, heading in (("activation", "Activations"), ("weight", "Weights"),
                          ("gradient", "Gradients")):  # fmt: skip
        lines += [f"## {heading}", "", "```{eval-rst}"]
        for card in catalogue(site).values():
            lines += [f".. automodule:: {card.layer.__module__}",
                      f"   :members: {card.layer.__name__}"]  # fmt: skip
        lines += ["```", ""]
    write(app, "methods.md", "\n".join(lines))


def write_catalogue(app):
    """Write the tables of all methods, with pictures, for the page that includes them."""
    from normlab.report import listing

    listing.write(catalogue().values(), Path(app.srcdir, "_catalogue.md"))


def write_claims(app):
    """Write the ledger from the records, so that no verdict is a hand's."""
    from normlab import claims
    from normlab.claims import page
    from normlab.report.extra import need
    from normlab.report.look import Look

    ledger = list(claims.ledger().values())
    drawn = []
    for number, (title, chart) in enumerate(page.figures(page.rows(ledger, "cpu"), Look(False))):
        name = f"images/_claims-{number}.svg"
        svg = need("vl_convert").vegalite_to_svg(chart.to_dict())
        write(app, name, svg)
        drawn += [f"![{title}]({name})", "", f"*{title}*", ""]
    write(app, "claims.md", "\n".join([
        "# Claims", "",
        "What papers claim, and what measurements say. Each claim has a protocol and a rule that "
        "were fixed before the run; every verdict is computed from records by `normlab claims`. "
        "Where a claim was tested anew after records had been seen, its note says so. *Not "
        "reproduced* is no refutation: where it says *undecided*, the interval reaches across a "
        "border of the rule, and more repetitions would tell. Scales are small: what a processor "
        "does in a night. Repeat one with `normlab claims run ID`.", "",
        *drawn, page.markdown(ledger, "cpu"),
    ]))  # fmt: skip


def setup(app):
    """Escape before napoleon, which adds markup of its own, reads the docstrings."""
    app.connect("builder-inited", write_methods)
    app.connect("builder-inited", write_catalogue)
    app.connect("builder-inited", write_claims)
    app.connect("autodoc-process-docstring", escape, priority=400)
