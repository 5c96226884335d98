"""A figure as SVG that stands in a page: colours of the page's style sheet, names that no other figure has."""

from __future__ import annotations

import io
import re

from matplotlib.figure import Figure

from sweep.report.style import VARIABLES

NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
NOT_NEEDED = re.compile(r"<!--.*?-->\s*|<defs>\s*<style.*?</style>\s*</defs>\s*", re.DOTALL)
COLOUR = re.compile(r"#[0-9a-f]{6}\b")
NAMED = re.compile(r' id="([^"]+)"')
NAME = re.compile(r'(?<=href="#)[^"]+|(?<=url\(#)[^)]+')
FONT = "DejaVuSans"  # how the names of letters begin, in every figure alike
LETTER = re.compile(rf'<path id="({FONT}[^"]*)" [^>]*/>\n')
NO_DEFINITIONS = "<defs>\n</defs>\n"
LONG_NUMBER = re.compile(r"(?<=\.\d\d)\d+")
PLACES = re.compile(r' (?:d|x|y)="[^"]*"')


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` of class `name`'s last word; each of its ids begins with `name`, but those of letters.

    Colours that `VARIABLES` knows become the style sheet's, so that the page decides between light and dark.
    """
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata=NO_METADATA)
    text = NOT_NEEDED.sub("", written.getvalue())
    body = text[text.index(">", text.index("<svg")) + 1 :]
    width, height = figure.get_size_inches() * 72
    referred = set(NAME.findall(body))
    body = NAMED.sub(lambda found: f' id="{_own(name, found[1])}"' if found[1] in referred else "", body)
    body = NAME.sub(lambda found: _own(name, found[0]), body)
    body = COLOUR.sub(lambda found: f"var(--{VARIABLES[found[0]]})" if found[0] in VARIABLES else found[0], body)
    body = PLACES.sub(lambda found: LONG_NUMBER.sub("", found[0]), body)
    kind = name.rpartition("-")[2]
    view = f"0 0 {width:g} {height:g}"
    lines = (line.strip() for line in body.splitlines())
    return f'<svg class="{kind}" viewBox="{view}" aria-hidden="true" focusable="false">\n' + "\n".join(
        line for line in lines if line
    )


def share_letters(page: str) -> str:
    """The page with the shape of every letter in it once, where the page begins: they are most of a figure's bytes."""
    letters = {found[1]: found[0] for found in LETTER.finditer(page)}
    shapes = "".join(text for _, text in sorted(letters.items()))
    opening = f'<svg class="letters" width="0" height="0" aria-hidden="true"><defs>\n{shapes}</defs></svg>\n'
    return LETTER.sub("", page).replace(NO_DEFINITIONS, "").replace("<body>\n", f"<body>\n{opening}", 1)


def _own(name: str, identity: str) -> str:
    return identity if identity.startswith(FONT) else f"{name}-{identity}"
