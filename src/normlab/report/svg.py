"""Turn a chart into an inline SVG that follows the page's colours and needs no script."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from normlab.report.extra import need
from normlab.report.look import LIGHT, MARKERS, SERIES_MARKER

_ARIA = ("aria-label", "aria-roledescription", "aria-hidden", "role")
_NOISE = ("pointer-events", "font-family", "stroke-miterlimit")
_LONG = re.compile(r"-?\d+\.\d{3,}")
_TONES = {marker: f"var(--{name})" for name, marker in MARKERS.items()}


def inline(chart: Any, label: str) -> str:
    """Draw a chart as SVG to be put into HTML.

    Args:
        chart: An Altair chart in the page's marker colours.
        label: The figure's accessible name.

    Returns:
        An ``<svg>`` element: one image to a screen reader (its numbers stand in a table beside
        it), with a tooltip and the series' number (``data-s``) on each mark.
    """
    drawn = need("vl_convert").vegalite_to_svg(chart.to_dict())
    root = ElementTree.fromstring(drawn)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML puts inline SVG into its namespace
        _recolour(element)
        _name(element)
        _shorten(element)
    _prune(root)
    width, height = root.attrib.pop("width"), root.attrib.pop("height")
    root.attrib.clear()
    root.attrib.update(
        {"viewBox": f"0 0 {width} {height}", "class": "chart", "role": "img", "aria-label": label}
    )
    return ElementTree.tostring(root, encoding="unicode")


def _recolour(element: ElementTree.Element) -> None:
    """Replace marker colours by CSS variables and number the series."""
    for key in ("fill", "stroke"):
        value = element.get(key, "")
        if value in _TONES:
            element.set(key, _TONES[value])
        elif value.startswith(SERIES_MARKER):
            series = int(value.removeprefix(SERIES_MARKER), 16)
            element.set(key, f"var(--s{series % len(LIGHT)})")
            element.set("data-s", str(series))


def _name(element: ElementTree.Element) -> None:
    """Turn a mark's description into a tooltip and drop what the table says better."""
    label = element.get("aria-label")
    if label and element.get("data-s") is not None:
        title = ElementTree.SubElement(element, "title")
        title.text = label
    for key in (*_ARIA, *_NOISE):
        element.attrib.pop(key, None)


def _shorten(element: ElementTree.Element) -> None:
    """Round coordinates to a hundredth of a pixel and drop defaults."""
    for key in ("transform", "d", "x2", "y2"):
        if key in element.attrib:
            element.set(
                key, _LONG.sub(lambda found: f"{float(found[0]):.2f}", element.get(key, ""))
            )
    if element.get("opacity") == "1":
        del element.attrib["opacity"]


def _prune(parent: ElementTree.Element) -> None:
    """Remove hidden and empty paths, and groups that hold nothing."""
    for child in list(parent):
        _prune(child)
        empty_path = child.tag == "path" and not child.get("d")
        backdrop = child.get("class") in ("background", "foreground")
        empty_group = child.tag == "g" and not len(child)
        if empty_path or backdrop or empty_group or child.get("display") == "none":
            parent.remove(child)
