"""Draw the map of the package, `docs/assets/wings.svg`, from what the wings say of themselves."""

import ast
import re
import textwrap
from dataclasses import dataclass
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
PACKAGE: Final = ROOT / "eoepca_security"
MAP: Final = ROOT / "docs" / "assets" / "wings.svg"

_ERRORS: Final = "errors"
_SENTENCES: Final = re.compile(r"(?P<purpose>.+?\.) May import (?P<below>.+)\.")

# Of the drawing, in pixels.
_BOX: Final = (310, 62)
_GAP: Final = (24, 30)
_MARGIN: Final = 12
_LANE: Final = 24
_TEXT_WIDTH: Final = 46

_STYLE: Final = """\
.wings{font:12px/1.2 system-ui,sans-serif}
.wings text{fill:#1f2328}
.wings .name{font-weight:600;font-size:14px}
.wings .paper{fill:#fff;stroke:#d1d9e0}
.wings .base{fill:#f6f8fa;stroke:#59636e}
.wings .proxy{fill:#ddf4ff;stroke:#0969da}
.wings .arrow{fill:none;stroke:#59636e;stroke-width:1.5;marker-end:url(#wings-tip)}
.wings .tip{fill:#59636e}
@media (prefers-color-scheme:dark){
.wings text{fill:#f0f6fc}
.wings .paper{fill:#0d1117;stroke:#3d444d}
.wings .base{fill:#212830;stroke:#9198a1}
.wings .proxy{fill:#0f2d4d;stroke:#4493f8}
.wings .arrow{stroke:#9198a1}
.wings .tip{fill:#9198a1}
}
"""


@dataclass(frozen=True)
class Wing:
    """A folder of the package: what it is for, and its neighbours below, which it may import.

    It may also import what these may import. `folder` is relative to the package.
    """

    name: str
    folder: str
    purpose: str
    below: tuple[str, ...]


def wings() -> dict[str, Wing]:
    """Return all wings by name, and `errors`, as they describe themselves.

    Raises ValueError where one does not, and where they form a circle.
    """
    module = PACKAGE / f"{_ERRORS}.py"
    found = {_ERRORS: Wing(_ERRORS, module.name, _first_line(module), ())}
    for file in sorted([*PACKAGE.glob("*/__init__.py"), *PACKAGE.glob("proxy/*/__init__.py")]):
        folder = file.parent.relative_to(PACKAGE).as_posix()
        if folder == "proxy":  # holds wings, and is none
            continue
        said = _SENTENCES.fullmatch(_first_line(file))
        if said is None:
            raise ValueError(f"{file}: its first line has to be a purpose, and then: May import `a` and `b`.")
        name = file.parent.name
        found[name] = Wing(name, folder, said["purpose"], tuple(re.findall(r"`(\w+)`", said["below"])))
    TopologicalSorter({name: wing.below for name, wing in found.items()}).prepare()
    return found


def allowed(name: str, among: dict[str, Wing]) -> set[str]:
    """Return what a wing may import: its neighbours below, and what they may."""
    below = among[name].below
    return set(below).union(*(allowed(other, among) for other in below))


def svg() -> str:
    """Return the map: a row for each step down, the way of the imports."""
    found = wings()
    rows = _rows(found)
    width, height = _BOX
    places = {
        name: (_MARGIN + column * (width + _GAP[0]), _MARGIN + row * (height + _GAP[1]))
        for row, names in enumerate(rows)
        for column, name in enumerate(names)
    }
    right = max(x for x, _ in places.values()) + width
    total = (right + _LANE + _MARGIN, max(y for _, y in places.values()) + height + _MARGIN)
    arrows = [
        _arrow(places[name], places[other], right + _LANE) for name, wing in found.items() for other in wing.below
    ]
    boxes = [_box(found[name], *place) for name, place in places.items()]
    said = " ".join(f"{name} may import {', '.join(wing.below)}." for name, wing in found.items() if wing.below)
    return f"""\
<svg class="wings" viewBox="0 0 {total[0]} {total[1]}" width="{total[0]}" role="img" \
aria-labelledby="wings-title wings-text" xmlns="http://www.w3.org/2000/svg">
<!-- Made by `uv run tools/wings.py`: change the sentence in a wing's __init__.py, and run it. -->
<title id="wings-title">The wings of eoepca_security, and which may import which</title>
<desc id="wings-text">{said}</desc>
<defs><marker id="wings-tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" \
orient="auto"><path class="tip" d="M0 0 10 5 0 10z"/></marker></defs>
<style>
{_STYLE}</style>
<rect class="paper" x=".5" y=".5" width="{total[0] - 1}" height="{total[1] - 1}" rx="10"/>
{"".join(arrows)}{"".join(boxes)}</svg>
"""


def _rows(found: dict[str, Wing]) -> list[list[str]]:
    """Return the names from the top down, each above all that it may import; in a row, the most used comes first."""
    users = {name: sum(name in allowed(other, found) for other in found) for name in found}
    levels = {name: _level(name, found) for name in found}
    return [
        sorted((name for name in found if levels[name] == level), key=lambda name: (-users[name], name))
        for level in range(max(levels.values()), -1, -1)
    ]


def _level(name: str, found: dict[str, Wing]) -> int:
    return 1 + max((_level(other, found) for other in found[name].below), default=-1)


def _box(wing: Wing, x: int, y: int) -> str:
    kind = "proxy" if wing.folder.startswith("proxy/") else "base"
    lines = textwrap.wrap(wing.purpose.replace("`", ""), _TEXT_WIDTH)
    texts = "".join(f'<text x="{x + 12}" y="{y + 37 + 15 * i}">{escape(line)}</text>\n' for i, line in enumerate(lines))
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{_BOX[0]}" height="{_BOX[1]}" rx="6"/>\n'
        f'<text class="name" x="{x + 12}" y="{y + 20}">{wing.folder}</text>\n{texts}'
    )


def _arrow(start: tuple[int, int], end: tuple[int, int], lane: int) -> str:
    """Return an arrow from a box to one below it: straight to the next row, and by the lane on the right beyond."""
    (x1, y1), (x2, y2), (width, height) = start, end, _BOX
    if y2 - y1 == height + _GAP[1]:
        middle = width // 2
        # Where both columns lead to one box, they arrive side by side.
        path = f"M{x1 + middle} {y1 + height}L{x2 + middle + (x1 - x2) // 4} {y2 - 1}"
    else:
        path = f"M{x1 + width} {y1 + height // 2}H{lane}V{y2 + height // 2}H{x2 + width + 1}"
    return f'<path class="arrow" d="{path}"/>\n'


def _first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


if __name__ == "__main__":
    MAP.write_text(svg(), encoding="utf-8")
