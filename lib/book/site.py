"""The Sphinx extension of the book: chapter cards, parameter tables, the scoreboard.

Named in `_config.yml`; `book build` runs it. Directives: `chapter-card`, `parameters-table`,
`scoreboard`, `families`, `execution`, `figures`, `paths`. Whatever they cannot show is a warning,
and warnings fail the build.
"""

import hashlib
import json
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.osutil import relative_uri
from sphinxcontrib.bibtex import plugin
from sphinxcontrib.bibtex.style.referencing import BracketStyle
from sphinxcontrib.bibtex.style.referencing.author_year import AuthorYearReferenceStyle

from lib.book import (
    places,
    site_access,
    site_data,
    site_execution,
    site_figures,
    site_math,
    site_outputs,
    site_paths,
    site_scoreboard,
    site_terms,
    stale,
)
from lib.book.site_outputs import Board
from lib.errors import BookError

LOG = logging.getLogger(__name__)
HERE = Path(__file__).parent


def _round() -> BracketStyle:
    return BracketStyle("(", ")")


class BookReferences(AuthorYearReferenceStyle):
    """Citations as (Gu et al., 2024) and Gu et al. (2024)."""

    def __init__(self) -> None:
        super().__init__(
            bracket_textual=_round(), bracket_parenthetical=_round(), bracket_year=_round()
        )


class FactsDirective(SphinxDirective):
    """A directive that shows facts of its own notebook; a BookError becomes a warning."""

    def run(self) -> list[nodes.Node]:
        """The directive's nodes, none where the facts cannot be had."""
        path = Path(self.env.doc2path(self.env.docname))
        try:
            return self.show(site_data.chapter(path), Path(self.env.srcdir))
        except BookError as error:
            LOG.warning("%s: %s", self.name, error, location=self.get_location())
            return []

    def show(self, chapter: site_data.Chapter, book: Path) -> list[nodes.Node]:
        """The nodes for one chapter."""
        raise NotImplementedError


class ParametersTable(FactsDirective):
    """The parameters of the chapter as a table."""

    def show(self, chapter: site_data.Chapter, book: Path) -> list[nodes.Node]:
        """A table: name, type, default, range, meaning."""
        rows = []
        for one in chapter.parameters.values():
            # as JSON: true and false as the command line takes them, spaces of a text in sight
            default = escape(json.dumps(one.default, ensure_ascii=False), quote=False)
            range_ = escape(f"{one.range} {one.unit}".strip())
            rows.append(
                f'<tr><td data-label="name"><code>{escape(one.name)}</code></td>'
                f'<td data-label="type">{one.type}</td>'
                f'<td data-label="default"><code>{default}</code></td>'
                f'<td data-label="range">{range_}</td>'
                f'<td data-label="meaning">{escape(one.description)}</td></tr>'
            )
        if not rows:
            return [nodes.paragraph("", "This chapter has no parameters.")]
        head = "".join(
            f'<th scope="col">{name}</th>'
            for name in ("Name", "Type", "Default", "Range", "Meaning")
        )
        table = (
            f'<table class="parameters"><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table>"
        )
        return [nodes.raw("", table, format="html")]


class ChapterCard(FactsDirective):
    """What a reader wants to know before starting a chapter."""

    def show(self, chapter: site_data.Chapter, book: Path) -> list[nodes.Node]:
        """A list of facts; those the notebook does not have yet are left out."""
        self.env.note_dependency(str(book / site_data.BIB))
        card = nodes.definition_list(classes=["chapter-card"])
        for term, text in self.facts(chapter, book):
            item = nodes.definition_list_item()
            item += nodes.term("", term)
            body = nodes.paragraph()
            children, messages = self.state.inline_text(text, self.lineno)
            body += children + messages
            item += nodes.definition("", body)
            card += item
        return [card] if card.children else []

    def facts(self, chapter: site_data.Chapter, book: Path) -> list[tuple[str, str]]:
        """`(name, MyST text)` of every fact there is."""
        about = chapter.facts
        papers = [
            one for one in site_data.papers(book / site_data.BIB) if one.family == chapter.slug
        ]
        rows = {
            "Papers": "; ".join(f"{{cite:t}}`{one.key}`" for one in papers),
            "Models": ", ".join(about.get("models", [])),
            "Data": ", ".join(about.get("data", [])),
            "Read first": ", ".join(f"{{doc}}`{slug}`" for slug in about.get("prerequisites", [])),
            "Run time": _measured(about.get("measured", {})),
            "Last run": _last_run(about.get("last_run", {})),
            "Claims": _claims(chapter.claims),
        }
        return [(name, text) for name, text in rows.items() if text]


def _measured(measured: dict) -> str:
    order = [name for name in ("smoke", "default", "full") if name in measured]
    return "; ".join(
        f"{name} {measured[name]['seconds']:.0f} s, {measured[name]['peak_gib']:.1f} GiB"
        for name in order
    )


def _last_run(run: dict) -> str:
    if not run:
        return ""
    names = {"python": "Python", "torch": "torch", "transformers": "transformers", "numpy": "NumPy"}
    versions = run.get("versions", {})
    shown = [f"{title} {versions[name]}" for name, title in names.items() if name in versions]
    return "; ".join([run.get("date", ""), ", ".join(shown)]).strip("; ")


def _claims(claims: list[dict]) -> str:
    if not claims:
        return ""
    held = sum(claim.get("holds") is True for claim in claims)
    return f"{held} of {len(claims)} held; see the {{doc}}`scoreboard`"


class BoardDirective(SphinxDirective):
    """What is made from all chapters, the scoreboard first; filled in `fill_boards`."""

    def run(self) -> list[nodes.Node]:
        """The node that stands for it."""
        self.env.metadata[self.env.docname]["book_board"] = self.name
        return [Board(kind=self.name)]


def written_chapters(app: Sphinx) -> list[site_data.Chapter]:
    """The chapters of families that are pages of this book, in the order of the families."""
    names = [f"chapters/{slug}" for slug in site_data.FAMILIES]
    found = [name for name in names if name in app.env.found_docs]
    return [site_data.chapter(Path(app.env.doc2path(name))) for name in found]


def notebooks(app: Sphinx) -> list[str]:
    """The names of all pages that are notebooks, in the order of the contents."""
    found, todo = [], [app.config.root_doc]
    while todo:
        name = todo.pop(0)
        if app.env.doc2path(name).endswith(".ipynb"):
            found.append(name)
        todo = app.env.toctree_includes.get(name, []) + todo
    return found


def fill_boards(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put the scoreboard, another board or a chapter's claims where their nodes stand."""
    boards = list(doctree.findall(Board))
    if not boards:
        return
    links = Links(app, docname)
    try:
        papers = site_data.papers(Path(app.srcdir) / site_data.BIB)
        made = [_board_html(app, board, papers, links) for board in boards]
    except BookError as error:
        LOG.warning("%s", error, location=docname)
        made = [""] * len(boards)
    for board, html in zip(boards, made, strict=True):
        board.replace_self(nodes.raw("", html, format="html"))


def _board_html(app: Sphinx, board: Board, papers: list[site_data.Paper], links: "Links") -> str:
    if board["kind"] == "claims":
        site_data.check_claims(board["claims"], papers, links.docname)
        by_key = {paper.key: paper for paper in papers}
        return site_scoreboard.held_up_html(board["claims"], by_key, links.section)
    if board["kind"] == "execution":
        return site_execution.execution_html(
            [_execution_row(app, n, links) for n in notebooks(app)]
        )
    if board["kind"] == "figures":
        shown = [
            (links.title(name), links.address(name), app.env.metadata[name]["book_figures"])
            for name in notebooks(app)
        ]
        return site_figures.figures_html(shown, links.image)
    if board["kind"] == "paths":
        return site_paths.paths_html(links.page, lambda slug: links.title(f"chapters/{slug}"))
    chapters = written_chapters(app)
    for one in chapters:
        site_data.check_claims(one.claims, papers, f"chapters/{one.slug}.ipynb")
    if board["kind"] == "families":
        return site_scoreboard.families_html(papers, links.page)
    return site_scoreboard.scoreboard_html(
        papers, chapters, links.section, links.citation, links.page
    )


def _execution_row(app: Sphinx, name: str, links: "Links") -> site_execution.Row:
    path = Path(app.env.doc2path(name))
    notebook = places.read_notebook(path)
    why = stale.reasons(Path(app.srcdir), path.stem, notebook)
    facts = notebook.metadata.get("book", {})
    return site_execution.Row(links.title(name), links.address(name), facts, why)


class Links:
    """Addresses as seen from one page."""

    def __init__(self, app: Sphinx, docname: str) -> None:
        self.app, self.docname = app, docname
        cite = app.env.get_domain("cite")
        self.cited = {one.key: one for one in cite.citations}
        self.labels = app.env.get_domain("std").anonlabels

    def page(self, slug: str) -> str | None:
        """The page of the chapter `slug`."""
        name = f"chapters/{slug}"
        if name not in self.app.env.found_docs:
            return None
        return self.address(name)

    def address(self, name: str) -> str:
        """The page `name`, `chapters/<slug>`."""
        return self.app.builder.get_relative_uri(self.docname, name)

    def title(self, name: str) -> str:
        """The title of a page, without its marks."""
        return self.app.env.titles[name].astext()

    def image(self, uri: str) -> str:
        """An image of another page, by its path in the book; `data:` addresses stay."""
        if uri not in self.app.env.images:
            return uri
        folder = relative_uri(self.app.builder.get_target_uri(self.docname), "_images")
        return f"{folder}/{self.app.env.images[uri][1]}"

    def section(self, key: str) -> str | None:
        """The section labelled `paper-<key>`."""
        name, anchor = self.labels.get(f"paper-{key}", (None, None))[:2]
        return f"{self.app.builder.get_relative_uri(self.docname, name)}#{anchor}" if name else None

    def citation(self, key: str) -> str | None:
        """The entry of the bibliography."""
        one = self.cited.get(key)
        if one is None:
            return None
        page = self.app.builder.get_relative_uri(self.docname, one.bibliography_key.docname)
        return f"{page}#{one.citation_id}"


def add_script(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    """The scoreboard's filter, on its page only."""
    if app.env.metadata.get(pagename, {}).get("book_board") == "scoreboard":
        app.add_js_file("scoreboard.js", loading_method="defer")


def _digest(paths) -> str:
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def outdated_boards(app: Sphinx, env, added: set, changed: set, removed: set) -> list[str]:
    """Pages with a board, whenever any notebook or the bibliography changed.

    The execution report is made anew each time: what makes outputs stale is anywhere in the book.
    """
    book = Path(app.srcdir)
    now = _digest([*(book / "chapters").glob("*.ipynb"), book / site_data.BIB])
    boards = {name: about.get("book_board") for name, about in env.metadata.items()}
    if getattr(env, "book_inputs", None) == now:
        return [name for name, kind in boards.items() if kind == "execution"]
    env.book_inputs = now
    return [name for name, kind in boards.items() if kind]


def outdated_links(app: Sphinx, env) -> list[str]:
    """All chapters, whenever the glossary or the chapters on the learning paths changed."""
    titles = {name: env.titles[name].astext() for name in notebooks(app) if name in env.titles}
    now = [site_terms.terms(app), titles]
    if getattr(env, "book_links", None) == now:
        return []
    env.book_links = now
    return list(titles)


def setup(app: Sphinx) -> dict:
    """Register everything with Sphinx."""
    plugin.register_plugin(
        "sphinxcontrib.bibtex.style.referencing", "book", BookReferences, force=True
    )
    site_math.setup(app)
    for part in (site_outputs, site_figures, site_terms, site_paths, site_access):
        part.setup(app)
    app.add_node(Board)
    app.add_directive("chapter-card", ChapterCard)
    app.add_directive("parameters-table", ParametersTable)
    for board in ("scoreboard", "families", "execution", "figures", "paths"):
        app.add_directive(board, BoardDirective)
    app.connect("env-get-outdated", outdated_boards)
    app.connect("env-updated", outdated_links)
    app.connect("doctree-resolved", fill_boards)
    app.connect("html-page-context", add_script)
    # a change to the pages' code, style or settings reads every page again: Sphinx would not
    book = Path(app.srcdir)
    sources = [*HERE.glob("site*.py"), *(book / "chapters/_static").rglob("*")]
    sources.append(book / "_config.yml")
    version = int(_digest(path for path in sources if path.is_file())[:8], 16)
    return {
        "version": "1",
        "env_version": version,
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
