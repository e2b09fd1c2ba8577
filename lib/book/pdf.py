"""`book build --pdf`: the built pages as one PDF, printed by headless Chromium.

The pages' articles are put one after another into one HTML file, which `print.css` lays out for
paper: a cover, a table of contents, running heads, page numbers, an outline. What only a screen can
use is changed: a panel shows its first state, solutions move to the end of their chapter, and code
that is folded on the page is left to the notebooks.
"""

import os
import re
import shutil
import subprocess
import tempfile
from datetime import date
from html import escape
from pathlib import Path

import yaml
from bs4 import BeautifulSoup, Tag

from lib.errors import BookError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
SECONDS = 900
# The sandbox needs rights that containers lack; the pages are the book's own, and no host is
# found. Fonts are read from the built pages beside the file.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--run-all-compositor-stages-before-draw", "--virtual-time-budget=20000",
)  # fmt: skip
PRINT = ("--no-pdf-header-footer", "--generate-pdf-document-outline")
# Attributes that name an element of the same page.
NAMED = ("id", "for", "aria-labelledby", "aria-describedby", "aria-controls")


def chromium() -> str:
    """The path of Chromium or Chrome. Raises BookError where there is none."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    if MAC.is_file():
        return str(MAC)
    raise BookError("the PDF is printed by Chromium or Chrome, and neither is on this machine")


def make(book: Path, folder: Path) -> Path:
    """Print the pages in `folder/html` into `folder/book.pdf`; its path.

    Raises BookError where there is no Chromium or it prints nothing.
    """
    browser = chromium()
    pages = _pages(book, folder / "html")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pdf-") as made:
        source, target = Path(made, "book.html"), Path(made, "book.pdf")
        text = combined(book, pages, Path(made))
        source.write_text(text, encoding="utf-8")
        _print(browser, source, target)
        # Chromium cannot write a page's number into the table of contents, so it prints twice.
        source.write_text(_numbered(text, page_numbers(target)), encoding="utf-8")
        _print(browser, source, target)
        return target.replace(folder / "book.pdf")


def combined(book: Path, pages: list[tuple[str, Path]], where: Path) -> str:
    """All pages as one HTML document, for a file in the folder `where`.

    pages: `(caption of its part or "", path of the built page)`, in order.
    """
    about = yaml.safe_load((book / "_config.yml").read_text(encoding="utf-8"))
    soups = [BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for _, path in pages]
    names = {path.resolve(): path.stem for _, path in pages}
    chapters, contents, heads = [], [], []
    for (caption, path), soup in zip(pages, soups, strict=True):
        article = soup.select_one("article.bd-article")
        for_paper(article, soup)
        _one_document(article, path, names, where)
        name, title = names[path.resolve()], _title(article)
        if caption:
            contents.append(f'<li class="toc-part">{escape(caption)}</li>')
        contents.append(
            f'<li><a href="#{name}--page">{escape(title)}</a>'
            f'<span class="toc-number" data-page="{name}--page"></span></li>'
        )
        quoted = title.replace("\\", "\\\\").replace('"', '\\"').replace("<", "\\3c ")
        heads.append(f'@page {name} {{ @top-right {{ content: "{quoted}"; }} }}')
        chapters.append(
            f'<section class="chapter" id="{name}--page" style="page: {name}">{article}</section>'
        )
    first, path = soups[0], pages[0][1]
    styles = [link["href"] for link in first.select("link[rel=stylesheet]")]
    links = "".join(
        f'<link rel="stylesheet" href="{escape(_beside(path, style, where))}">' for style in styles
    )
    title, author = escape(str(about["title"])), escape(str(about.get("author", "")))
    return (
        f'<!DOCTYPE html><html lang="en" data-theme="light" class="book-pdf"><head>'
        f'<meta charset="utf-8"><title>{title}</title>{links}<style>{"".join(heads)}</style></head>'
        f'<body><header class="cover"><p class="cover-title">{title}</p><p>{author}</p>'
        f"<p>Printed on {date.today():%d %B %Y}</p></header>"
        f'<nav class="toc"><h1>Contents</h1><ol>{"".join(contents)}</ol></nav>'
        f'<main class="bd-main"><div class="bd-content"><div class="bd-article-container">'
        f"{''.join(chapters)}</div></div></main><script>{FIT}</script></body></html>"
    )


# What is still wider than the page, after print.css has wrapped what can be wrapped, is made
# smaller; the innermost elements first.
FIT = """addEventListener("load", () => document.fonts.ready.then(() => {
  const fitted = "table, math, svg, img, pre, .explore-screen > *";
  for (const e of [...document.querySelectorAll("article :is(" + fitted + ")")].reverse())
    for (let zoom = 1, tries = 0; tries < 3; tries++) {
      const room = e.closest("article").getBoundingClientRect().right;
      const box = e.getBoundingClientRect();
      if (box.right <= room + 1 || box.left >= room) break;
      e.style.zoom = zoom *= 0.99 * (room - box.left) / box.width;
    }
}));"""


def for_paper(article: Tag, soup: BeautifulSoup) -> None:
    """Change in place what only a screen can use."""
    for controls in article.select(".explore-controls"):
        shown = ", ".join(_control(one) for one in controls.select(".explore-control"))
        controls.clear()
        controls.append(f"Shown for {shown}. The panel on the web page has the other states.")
    for dead in article.select("script, nav, form, button, [hidden], a.headerlink"):
        dead.decompose()
    solutions = []
    for cell in article.select(".cell.tag_exercise-solution"):
        exercise = cell.find_previous("div", class_="exercise")
        name = exercise.select_one(".admonition-title").get_text(" ", strip=True)
        note = soup.new_tag("p", attrs={"class": "solution-note"})
        link = soup.new_tag("a", href=f"#solution-{len(solutions) + 1}")
        link.string = "The solution is at the end of this chapter."
        note.append(link)
        cell.replace_with(note)
        for fold in cell.select("details.hide"):
            fold.summary.decompose()
            fold.unwrap()
        solutions.append((name, cell))
    for fold in article.select("details.hide"):
        fold.decompose()
    if solutions:
        article.append(_heading(soup, "h2", "Solutions", "solutions"))
    for number, (name, cell) in enumerate(solutions, start=1):
        article.append(_heading(soup, "h3", name, f"solution-{number}"))
        article.append(cell)


def _control(control: Tag) -> str:
    """`layer 3`: the label of a control and the value that it shows first."""
    value = control.select_one("output, option[selected]") or control.select_one("option")
    label = control.label.get_text(strip=True)
    # the first string alone: an option that is not closed holds those after it
    return f"{label} {value.find(string=True).strip()}" if value else label


def _heading(soup: BeautifulSoup, level: str, text: str, ident: str) -> Tag:
    heading = soup.new_tag(level, id=ident)
    heading.string = text
    return heading


def _one_document(article: Tag, path: Path, names: dict[Path, str], where: Path) -> None:
    """Make ids differ from those of other pages, and addresses right for a file in `where`."""
    own = names[path.resolve()]
    for tag in article.find_all(True):
        if tag.find_parent("svg"):  # refers to its own parts alone
            continue
        for attribute in NAMED:
            if tag.get(attribute):
                tag[attribute] = " ".join(f"{own}--{one}" for one in tag[attribute].split())
        if tag.get("src"):
            tag["src"] = _beside(path, tag["src"], where)
            tag["loading"] = "eager"
        if tag.name == "a" and tag.get("href"):
            tag["href"] = _link(tag["href"], path, names, where)


def _link(address: str, path: Path, names: dict[Path, str], where: Path) -> str:
    if re.match(r"[a-z]+:", address):
        return address
    file, _, fragment = address.partition("#")
    name = names.get((path.parent / file).resolve() if file else path.resolve())
    if name:
        return f"#{name}--{fragment or 'page'}"
    return _beside(path, address, where)


def _beside(page: Path, address: str, where: Path) -> str:
    """An address on `page`, as a file in the folder `where` has to name it."""
    if re.match(r"[a-z]+:", address):
        return address
    return Path(os.path.relpath(page.parent, where), address).as_posix()


def _title(article: Tag) -> str:
    heading = article.find("h1")
    return heading.get_text(" ", strip=True) if heading else "Untitled"


def _pages(book: Path, html: Path) -> list[tuple[str, Path]]:
    """`(caption of the part that it begins or "", built page)` for each page of `_toc.yml`."""
    from lib.book import build

    toc = yaml.safe_load((book / "_toc.yml").read_text(encoding="utf-8"))
    first = {}
    for part in toc.get("parts", []):
        names = build.toc_names(part)
        first[names[0]] = part.get("caption", "")
    return [(first.get(name, ""), html / f"{Path(name)}.html") for name in build.toc_names(toc)]


def _print(browser: str, source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="book-chromium-", ignore_cleanup_errors=True) as own:
        command = [browser, *FLAGS, *PRINT, f"--user-data-dir={own}", f"--print-to-pdf={target}"]
        try:
            done = subprocess.run(
                [*command, source.as_uri()], capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            raise BookError(f"Chromium did not finish the PDF in {SECONDS} s") from None
    if not target.is_file():
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BookError(f"Chromium printed no PDF: {said}")


def page_numbers(pdf: Path) -> dict[str, int]:
    """Name of a link's target → the page it is on, from 1, as Chromium writes them in a PDF.

    Chromium leaves the objects that say so uncompressed: the list of pages, and the dictionary of
    destinations, whose names are escaped as `#xx`.
    """
    text = pdf.read_bytes().decode("latin-1")
    order = [page for kids in re.findall(r"/Kids \[([^\]]*)\]", text) for page in kids.split("R")]
    pages = set(re.findall(r"(?m)^(\d+) 0 obj\s*<</Type /Page\b(?!s)", text))
    numbered = [one.split()[0] for one in order if one.split() and one.split()[0] in pages]
    at = {ident: number for number, ident in enumerate(numbered, start=1)}
    found = re.findall(r"/(\S+) \[(\d+) 0 R /XYZ", text)
    return {
        re.sub(r"#([0-9A-Fa-f]{2})", lambda hexa: chr(int(hexa[1], 16)), name): at[ident]
        for name, ident in found
        if ident in at
    }


def _numbered(text: str, numbers: dict[str, int]) -> str:
    def number(match: re.Match) -> str:
        return f"{match[0]}{numbers.get(match[1], '')}"

    return re.sub(r'<span class="toc-number" data-page="([^"]+)">', number, text)
