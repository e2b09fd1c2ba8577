"""Links from the chapters to the glossary: the first use of each term, made when pages are written.

Nobody marks terms by hand. Only prose is searched: no headings, tables, code, equations, claims,
outputs or text that is a link already.
"""

import re
from collections.abc import Iterable

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

# A term's place and meaning: `(page, anchor, definition)`.
Terms = dict[str, tuple[str, str, str]]

NOT_PROSE = (
    nodes.title, nodes.reference, nodes.literal, nodes.math, nodes.raw, nodes.caption,
    nodes.table, nodes.definition_list, nodes.FixedTextElement, addnodes.pending_xref,
)  # fmt: skip
OTHER_PARTS = {"claim", "cell_output", "cell_input"}
# In the glossary, but words of everyday prose as well: a link would often stand on another meaning.
EVERYDAY = {"claim", "profile", "verdict"}


def collect(app: Sphinx, doctree: nodes.document) -> None:
    """Keep the terms of a page's glossary, where it has one, in its metadata."""
    found = {}
    for item in doctree.findall(nodes.definition_list_item):
        if not isinstance(item.parent.parent, addnodes.glossary):
            continue
        meaning = " ".join(item.children[-1].astext().split())
        for term in item.findall(nodes.term):
            found[term.astext()] = (term["ids"][0], meaning)
    if found:
        app.env.metadata[app.env.docname]["book_terms"] = found


def terms(app: Sphinx) -> Terms:
    """The terms of the book's glossaries that are linked to."""
    return {
        term: (page, *place)
        for page, about in app.env.metadata.items()
        for term, place in about.get("book_terms", {}).items()
        if term not in EVERYDAY
    }


def pattern(words: Iterable[str]) -> re.Pattern:
    """Finds each of the terms as whole words, in the plural too, the longest first.

    What it finds is no part of a longer word, not of a hyphenated one either.
    """
    ordered = sorted(words, key=len, reverse=True)
    each = "|".join(f"({_either_number(word)})" for word in ordered)
    return re.compile(rf"(?i)(?<![\w-])(?:{each})(?![\w-])")


def _either_number(word: str) -> str:
    text = re.escape(word).replace(r"\ ", r"\s+")
    return rf"{text[:-1]}(?:y|ies)" if word.endswith("y") else rf"{text}(?:s|es)?"


def link(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Link the first use of each term in a chapter's prose to the glossary."""
    if not app.env.doc2path(docname).endswith(".ipynb"):
        return
    open_terms = terms(app)
    for text in [text for text in doctree.findall(nodes.Text) if is_prose(text)]:
        if not open_terms:
            return
        text.parent.replace(text, _linked(app, docname, text, open_terms))


def is_prose(text: nodes.Text) -> bool:
    """Whether a text stands in a paragraph, and in nothing that is not prose."""
    above, node = [], text.parent
    while node is not None:
        above.append(node)
        node = node.parent
    kinds = any(isinstance(one, NOT_PROSE) for one in above)
    parts = any(OTHER_PARTS & set(one.get("classes", [])) for one in above)
    return any(isinstance(one, nodes.paragraph) for one in above) and not kinds and not parts


def _linked(app: Sphinx, docname: str, text: nodes.Text, open_terms: Terms) -> list[nodes.Node]:
    """The text in pieces, with links; the terms that it links are taken out of `open_terms`."""
    pieces, at, whole = [], 0, text.astext()
    names = sorted(open_terms, key=len, reverse=True)
    for match in pattern(names).finditer(whole):
        term = names[match.lastindex - 1]
        if term not in open_terms:
            continue
        page, anchor, meaning = open_terms.pop(term)
        address = f"{app.builder.get_relative_uri(docname, page)}#{anchor}"
        words = nodes.inline("", match[0])
        attributes = {"internal": True, "refuri": address, "reftitle": meaning}
        pieces.append(nodes.Text(whole[at : match.start()]))
        pieces.append(nodes.reference("", "", words, classes=["term"], **attributes))
        at = match.end()
    return [piece for piece in [*pieces, nodes.Text(whole[at:])] if piece.astext()]


def setup(app: Sphinx) -> None:
    """Register the two steps."""
    app.connect("doctree-read", collect)
    app.connect("doctree-resolved", link, priority=600)  # after references are resolved
