"""A bar chart as SVG, so that a page shows the figures without any library."""

from __future__ import annotations

from collections.abc import Mapping
from xml.sax.saxutils import escape

_LEFT, _WIDTH, _ROW = 130, 480, 30


def bars(title: str, values: Mapping[str, int]) -> str:
    """Named values as horizontal bars, in the order given."""
    most = max(values.values())
    height = _ROW * (len(values) + 1) + 10
    rows = [f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>']
    for index, (name, value) in enumerate(values.items()):
        top = _ROW * (index + 1) + 4
        length = max(1, round(_WIDTH * value / most))
        colour = "#005eb8" if name.startswith("tribill") else "#8a9299"
        rows += [
            f'<text x="{_LEFT - 8}" y="{top + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LEFT}" y="{top}" width="{length}" height="{_ROW - 9}" fill="{colour}"/>',
            f'<text x="{_LEFT + length + 6}" y="{top + 15}">{value:,}</text>',
        ]
    size = f'width="{_LEFT + _WIDTH + 90}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    background = f'<rect width="{_LEFT + _WIDTH + 90}" height="{height}" fill="white"/>'
    return "\n".join([head, background, *rows, "</svg>"]) + "\n"
