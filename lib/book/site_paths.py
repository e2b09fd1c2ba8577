"""Learning paths: their page, and previous and next by path at the foot of each chapter.

The paths themselves are data: `site_data.PATHS`. A reader picks one, on the page of the paths or
in any chapter; the browser remembers it. Without JavaScript the order of the book stays.
"""

from collections.abc import Callable
from html import escape

from sphinx.application import Sphinx

from lib.book.site_data import FAMILIES, PATHS

Link = Callable[[str], str | None]


def paths_html(page: Link, title: Link) -> str:
    """All paths as HTML. page, title: of a chapter by its slug, None where it is not written."""
    return "\n".join(
        f'<section class="path" data-path="{key}"><h2 id="path-{key}">{escape(path.title)}</h2>'
        f"<p>{escape(path.about)}</p>"
        '<button type="button" class="path-pick" aria-pressed="false" hidden>Follow this path'
        f"</button><ol>{''.join(_stop(slug, page, title) for slug in path.chapters)}</ol></section>"
        for key, path in PATHS.items()
    )


def _stop(slug: str, page: Link, title: Link) -> str:
    address = page(slug)
    if address:
        return f'<li><a href="{escape(address)}">{escape(title(slug))}</a></li>'
    return f'<li class="coming">{escape(FAMILIES.get(slug, slug))} <span>coming</span></li>'


def neighbours(chapters: tuple[str, ...], slug: str, page: Link) -> tuple[str | None, str | None]:
    """The written chapters before and after `slug` on a path, None at its ends."""
    at = chapters.index(slug)
    before = [one for one in chapters[:at] if page(one)]
    after = [one for one in chapters[at + 1 :] if page(one)]
    return (before[-1] if before else None, after[0] if after else None)


def nav_html(slug: str, page: Link, title: Link) -> str:
    """The choice of a path for a chapter's foot, with the links of each path it is on."""
    mine = {key: path for key, path in PATHS.items() if slug in path.chapters}
    if not mine:
        return ""
    options = "".join(
        f'<option value="{key}">{escape(path.title)}</option>' for key, path in mine.items()
    )
    links = "".join(_links(key, path.chapters, slug, page, title) for key, path in mine.items())
    return (
        '<nav class="path-nav" aria-label="Learning path" hidden>'
        '<p><label for="path-choice">Previous and next by</label> <select id="path-choice">'
        f'<option value="">the order of the book</option>{options}</select></p>{links}</nav>'
    )


def _links(key: str, chapters: tuple[str, ...], slug: str, page: Link, title: Link) -> str:
    before, after = neighbours(chapters, slug, page)
    parts = []
    if before:
        name = escape(title(before))
        parts.append(f'<a rel="prev" href="{escape(page(before))}">← {name}</a>')
    if after:
        name = escape(title(after))
        parts.append(f'<a rel="next" href="{escape(page(after))}">{name} →</a>')
    elif slug != chapters[-1]:
        whole = page("paths")
        rest = f'<a href="{escape(whole)}#path-{key}">chapters</a>' if whole else "chapters"
        parts.append(f"<span>The other {rest} of this path are coming.</span>")
    return f'<p class="path-links" data-path="{key}" hidden>{" ".join(parts)}</p>'


def add_nav(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    """Put the choice of a path at the end of a chapter's page."""
    folder, _, slug = pagename.rpartition("/")
    if folder != "chapters" or "body" not in context:
        return

    def page(name: str) -> str | None:
        there = f"chapters/{name}" in app.env.found_docs
        return app.builder.get_relative_uri(pagename, f"chapters/{name}") if there else None

    def title(name: str) -> str:
        return app.env.titles[f"chapters/{name}"].astext()

    context["body"] += nav_html(slug, page, title)


def setup(app: Sphinx) -> None:
    """Register the choice of a path and the script that remembers it."""
    app.connect("html-page-context", add_nav)
    app.add_js_file("aids.js", loading_method="defer")
