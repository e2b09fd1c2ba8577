"""The index of figures: every figure, drawing and panel of every chapter, with a link to its place.

What a chapter shows is noted while its page is read, and the index is made when all are.
"""

import re
from dataclasses import dataclass
from html import escape, unescape

from docutils import nodes
from sphinx.application import Sphinx

PANEL = re.compile(r'<div class="explore" id="([^"]+)"')
SCREEN = re.compile(r'class="explore-screen"[^>]*>\s*<img alt="([^"]*)" src="([^"]*)"')
CONTROL = re.compile(r'<label for="[^"]*">([^<]*)</label>')
DRAWING = re.compile(r"(?s)<svg\b.*?</svg>")
LABEL = re.compile(r'aria-label="([^"]*)"')


@dataclass(frozen=True)
class Figure:
    """A figure of a page.

    section: the heading that it stands under; alt: what it shows, in words; picture: the image's
    path in the book, a `data:` address or the text of an SVG, empty where there is none.
    """

    anchor: str
    section: str
    alt: str
    picture: str


def collect(app: Sphinx, doctree: nodes.document) -> None:
    """Give a chapter's images anchors and keep what the index needs in the page's metadata."""
    if not app.env.doc2path(app.env.docname).endswith(".ipynb"):
        return
    found = []
    for node in doctree.findall(lambda one: isinstance(one, nodes.image | nodes.raw)):
        title, anchor = _section(node)
        if isinstance(node, nodes.image):
            if not node["ids"]:
                node["ids"] = [f"figure-{len(found) + 1}"]
            picture = node.get("candidates", {}).get("*", node["uri"])
            found.append(Figure(node["ids"][0], title, node.get("alt", ""), picture))
        elif panel := PANEL.search(node.astext()):
            screen = SCREEN.search(node.astext())
            controls = ", ".join(CONTROL.findall(node.astext()))
            alt, picture = screen.groups() if screen else (f"A panel: you set {controls}.", "")
            found.append(Figure(panel[1], title, unescape(alt), picture))
        elif drawing := DRAWING.search(node.astext()):
            label = LABEL.search(drawing[0])
            words = unescape(label[1]) if label else ""
            found.append(Figure(anchor, title, words, drawing[0]))
    app.env.metadata[app.env.docname]["book_figures"] = found


def _section(node: nodes.Node) -> tuple[str, str]:
    """Title and anchor of the section that a node stands in."""
    while node is not None and not isinstance(node, nodes.section):
        node = node.parent
    return (node.children[0].astext(), node["ids"][0]) if node is not None else ("", "")


def figures_html(chapters: list[tuple[str, str, list[Figure]]], source) -> str:
    """The index as HTML.

    chapters: title, address and figures of each; source: from a figure's picture in the book to
    the address of the image.
    """
    parts = []
    for title, page, figures in chapters:
        if not figures:
            continue
        items = "".join(_item(n, one, page, source) for n, one in enumerate(figures, start=1))
        head = f'<a href="{escape(page)}">{escape(title)}</a>'
        parts.append(f'<h2>{head}</h2><ol class="figures">{items}</ol>')
    return "\n".join(parts)


def _item(number: int, figure: Figure, page: str, source) -> str:
    if figure.picture.startswith("<svg"):  # a word for the same thing stands beside it
        picture = figure.picture.replace("<svg", '<svg aria-hidden="true"', 1)
        picture = LABEL.sub("", picture.replace('role="img"', ""), count=1)
    elif figure.picture:
        address = escape(source(figure.picture))
        picture = f'<img loading="lazy" alt="Figure {number}" src="{address}">'
    else:
        picture = ""
    thumb = f'<span class="thumb">{picture}</span>' if picture else ""
    return (
        f'<li><a href="{escape(page)}#{escape(figure.anchor)}">{thumb}'
        f'<span class="figure-title">{escape(figure.section)}</span></a>'
        f"<p>{escape(figure.alt)}</p></li>"
    )


def setup(app: Sphinx) -> None:
    """Register the reading of figures."""
    app.connect("doctree-read", collect, priority=600)  # after Sphinx knows the images' files
