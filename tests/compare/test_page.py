"""The page is well-formed, draws inside its frames, and needs nothing from elsewhere."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatc.compare.grid import Cell
from qatc.compare.page import axis_over, to_html
from qatc.compare.summary import Row, rows_of
from tests.compare.test_summary import record

VOID = {"meta"}


class Checker(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.urls += [v or "" for name, v in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def rows(kls: list[float], **changes: Any) -> list[Row]:
    return rows_of(
        (
            Cell(
                "<bits> & more",
                {"model": "a/m", "bits": f"{n % 7 + 2}-8-4", "steps": n % 40, "seed": 0},
            ),
            record(kl) | {"bytes": 1000 * (n + 1)} | changes,
        )
        for n, kl in enumerate(kls)
    )


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.S)]


def coordinates(element: ElementTree.Element) -> list[tuple[float, float]]:
    """All points of a drawing, sizes of marks included."""
    found: list[tuple[float, float]] = []
    for node in element.iter():
        get = {name: value for name, value in node.attrib.items()}
        for x, y in (("x", "y"), ("x1", "y1"), ("x2", "y2"), ("cx", "cy")):
            if x in get:
                found.append((float(get[x]), float(get[y])))
        if node.tag == "polyline":
            found += [tuple(map(float, p.split(","))) for p in get["points"].split()]  # type: ignore[misc]
        if node.tag == "path":
            found += [
                (float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", get["d"])
            ]
    return found


@pytest.mark.parametrize(
    "kls", [[0.3], [0.3, 0.3], [0.5, 0.002, 0.0], [0.01 * n for n in range(1, 70)]]
)
def test_page(kls: list[float]) -> None:
    page = to_html(rows(kls), {"cell<1>": "error & <more>"})
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == [] and checker.urls == []
    assert "http" not in page and "<script" not in page and "@import" not in page
    assert "&lt;bits&gt; &amp; more" in page and "error &amp; &lt;more&gt;" in page
    drawn = svgs(page)
    charts = [svg for svg in drawn if svg.get("role") == "img"]
    assert len(charts) == 6
    for svg in drawn:
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        for x, y in coordinates(svg):
            assert math.isfinite(x) and math.isfinite(y)
            assert 0 <= x <= width and 0 <= y <= height
    assert len(charts[0].findall("g")) == len(kls)
    assert all(len(chart.findall("polyline")) == len(kls) for chart in charts[-2:])
    assert all(len(coordinates(line)) == 2 for line in charts[-1].findall("polyline"))
    assert page.count("<tr>") == 1 + 2 * len(kls)


def test_more_is_higher_and_further_right() -> None:
    charts = [svg for svg in svgs(to_html(rows([0.5, 0.05]), {})) if svg.get("role") == "img"]
    circles = [node.attrib for node in charts[0].iter() if node.tag in ("circle", "rect")]
    places = [(float(a.get("cx") or a["x"]), float(a.get("cy") or a["y"])) for a in circles]
    first, second = places
    assert first[0] < second[0], "fewer bytes stand to the left"
    assert first[1] < second[1], "more KL stands higher"


def test_a_grid_without_training_has_no_curve_and_every_colour_both_schemes() -> None:
    page = to_html(rows([0.1, 0.2], curve=[], layers=[]), {})
    assert len([svg for svg in svgs(page) if svg.get("role") == "img"]) == 4
    used = set(re.findall(r"var\((--\w+)\)", page))
    light, dark = (part for part in page.split("prefers-color-scheme: dark"))
    assert used and all(f"{name}:" in light and f"{name}:" in dark for name in used)


positive = st.floats(1e-6, 1e12)


@given(st.lists(positive, min_size=1, max_size=5), st.booleans())
def test_axes_hold_their_values_and_ticks(values: list[float], logarithmic: bool) -> None:
    axis = axis_over(values, 10, 500, logarithmic)
    for value in [*values, *axis.ticks()]:
        assert 10 - 1e-6 <= axis(value) <= 500 + 1e-6
    assert len(axis.ticks()) <= 22
