"""A chapter's MyST as the plain markdown that JupyterLab shows, and with MathML for slides."""

import re
from collections.abc import Callable
from pathlib import Path

from lib.book import page, places, site_data
from lib.book.chapter import Chapter
from lib.book.workshop_exercises import Exercise
from lib.errors import BookError

OPEN = re.compile(r"^([ ]{0,3})(`{3,}|:{3,})\{([\w:-]+)\}[ \t]*(.*)$")
ROLE = re.compile(r"\{([\w:-]+)\}`([^`]+)`")
TARGET = re.compile(r"^(.*?)\s*<([^>]*)>$", re.S)
LABELLED = re.compile(r"(?m)^([ ]{0,3}\$\$)[ \t]*\([\w:.-]+\)[ \t]*$")
FENCED = re.compile(r"(?ms)^[ ]{0,3}(`{3,}|~{3,}).*?^[ ]{0,3}\1[`~]*[ \t]*$")
ROLE_OR_CODE = re.compile(r"(\{[\w:-]+\}`[^`]+`)|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)", re.S)
BLOCK_MATH = re.compile(r"\$\$(.+?)\$\$", re.S)
INLINE_MATH = re.compile(r"(?<![\\$])\$(?=[^\s$])([^$]+?)(?<![\s\\])\$(?!\d)")
GONE = ("chapter-card", "parameters-table", "scoreboard", "families", "bibliography")
ASIDES = ("note", "tip", "hint", "warning", "important", "caution", "attention", "seealso")
Exercises = dict[int, list[Exercise]]  # by the index of the cell that their text stands in


class Words:
    """What the roles of one chapter mean: its citations and links to other chapters."""

    def __init__(self, chapter: Chapter):
        bib = chapter.book / site_data.BIB
        papers = site_data.papers(bib) if bib.is_file() else []
        self.papers = {paper.key: paper for paper in papers}
        self.book = chapter.book

    def role(self, match: re.Match) -> str:
        """The plain markdown of one role."""
        name, body = match[1].partition(":")[0], match[2].strip()
        if name in ("cite", "footcite"):
            return "; ".join(self._cited(key.strip()) for key in body.split(","))
        if name == "math":
            return f"${body}$"
        target = TARGET.match(body)
        if target:
            return target[1]
        return self._title(body) if name == "doc" else body

    def _cited(self, key: str) -> str:
        paper = self.papers.get(key)
        if paper is None:
            return f"[{key}]"
        return f"[{paper.byline}]({paper.url})" if paper.url else paper.byline

    def _title(self, name: str) -> str:
        path = self.book / "chapters" / f"{name}.ipynb"
        try:
            facts = places.read_notebook(path).metadata.get("book", {}) if path.is_file() else {}
        except BookError:
            facts = {}
        return f"*{facts.get('title', name)}*"


def plain(source: str, words: Words, exercises: list[Exercise] = ()) -> str:
    """Markdown without MyST: labels and directives of the page go, roles become their text,
    exercises headed blocks and asides quotations. Code stays as it is."""
    text = _directives(source, iter(exercises))
    text = LABELLED.sub(r"\1", text)
    text = outside_code(text, lambda part: page.plain_markdown(ROLE.sub(words.role, part)))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """`change` applied to all that is neither a fenced block nor inline code."""
    kept: list[str] = []

    def keep(match: re.Match) -> str:
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    text = FENCED.sub(keep, text)
    # A role's backticks are its own: it is found first, and left to `change`.
    text = ROLE_OR_CODE.sub(lambda match: match[0] if match[1] else keep(match), text)
    text = change(text)
    while "\0" in text:
        text = re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], text)
    return text


def _directives(source: str, exercises) -> str:
    lines, done, at = source.split("\n"), [], 0
    while at < len(lines):
        match = OPEN.match(lines[at])
        if not match:
            fence = re.match(r"^[ ]{0,3}(`{3,}|~{3,})", lines[at])
            end = _end(lines, at, fence[1]) if fence else at
            done += lines[at : end + 1]
            at = end + 1
            continue
        end = _end(lines, at, match[2])
        body = lines[at + 1 : end]
        while body and re.match(r"^\s*:[\w-]+:", body[0]):
            body = body[1:]
        inner = _directives("\n".join(body), exercises).strip("\n")
        done += _block(match[3], match[4].strip(), inner, exercises).split("\n")
        at = end + 1
    return "\n".join(done)


def _end(lines: list[str], at: int, fence: str) -> int:
    """Index of the line that closes the block begun at `at`; the last where none does."""
    for index in range(at + 1, len(lines)):
        bare = lines[index].strip()
        if bare.startswith(fence) and not bare.strip(fence[0]):
            return index
    return len(lines) - 1


def _block(name: str, argument: str, body: str, exercises) -> str:
    if name in GONE:
        return ""
    if name == "exercise":
        one = next(exercises, None)
        title = f"{one.number}: {one.title}" if one else argument
        size = f"*{one.difficulty} · {one.minutes} minutes*\n\n" if one else ""
        return f"### Exercise {title}\n\n{size}{body}"
    if name == "math":
        return f"$$\n{body or argument}\n$$"
    if name in ("code-block", "code", "code-cell"):
        return f"```{argument}\n{body}\n```"
    if name in ("figure", "image"):
        return f"![{body.splitlines()[0] if body else 'a figure'}]({argument})\n\n{body}"
    if name in ASIDES or name == "admonition":
        title = argument if name == "admonition" else name.capitalize()
        text = f"**{title}.** " + (body if name == "admonition" else f"{argument}\n{body}".strip())
        return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))
    return body


def with_mathml(text: str) -> str:
    """Plain markdown whose equations are MathML, which a browser draws without a script.

    Raises BookError for an equation that cannot be converted.
    """
    from math_core import LatexError

    from lib.book.site_math import to_mathml

    def made(match: re.Match, block: bool) -> str:
        try:
            html = " ".join(to_mathml(match[1], block).split())
        except LatexError as error:
            raise BookError(f"equation {' '.join(match[1].split())!r}: {error}") from None
        # Letters that markdown reads as marks stay letters.
        for mark in "*_`[]":
            html = html.replace(mark, f"&#{ord(mark)};")
        return f'\n\n<div class="math">{html}</div>\n\n' if block else html

    def change(part: str) -> str:
        part = BLOCK_MATH.sub(lambda match: made(match, True), part)
        return INLINE_MATH.sub(lambda match: made(match, False), part)

    return outside_code(text, change)


def pictures(source: str) -> list[str]:
    """Paths of the images that markdown shows from files of the chapters' folder."""
    found = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", source)
    found += re.findall(r"(?:figure|image)\}\s*(\S+)", source)
    return [path for path in found if not re.match(r"[a-z]+:|/|attachment:", path)]


def folder_of_pictures(book: Path) -> Path:
    """Where relative paths of images count from."""
    return book / "chapters"
