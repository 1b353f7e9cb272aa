"""What the report's tests share."""

import pytest

from normlab.report import charts, page, svg


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the figures out, which take nearly all of the time."""
    monkeypatch.setattr(svg, "inline", lambda chart, label: "<svg></svg>")
    built = charts.build

    def first_of_each_section(view, look):
        seen = set()
        for figure in built(view, look):
            if figure.section not in seen:
                seen.add(figure.section)
                yield figure

    monkeypatch.setattr(page.charts, "build", first_of_each_section)
