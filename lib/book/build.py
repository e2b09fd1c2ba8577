"""`book build`: the book as HTML, and as PDF, from outputs that are not stale, with no warning."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

import yaml

from lib.book import pdf, places, stale
from lib.errors import BookError

ANSI = re.compile(r"\x1b\[[0-9;]*m")
# myst-nb counts the lines of a notebook as 10,000 times the cell, from 1, plus the line in it.
CELL = re.compile(r"\.ipynb:(\d{5,}):")
# What Sphinx and Jupyter Book print around the one line that matters.
NOISE = re.compile(r"^(Traceback|  File |    |RuntimeError|=+$|\s*$|During handling|The above)")
# What the bare address shows: Jupyter Book's own has neither language, title nor icon.
FRONT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<link rel="icon" href="_static/favicon.svg">
<meta http-equiv="refresh" content="0; url={first}">
</head>
<body><a href="{first}">{title}</a></body>
</html>
"""


def main(args) -> int:
    """The command; `args` has `execute` and may have `out` and `pdf`."""
    wants_pdf = getattr(args, "pdf", False)
    return build(places.root(), args.execute, getattr(args, "out", None), wants_pdf)


def build(
    book: Path, execute: bool = False, out: str | Path | None = None, wants_pdf: bool = False
) -> int:
    """Build the book in `book` into `_build/html` and print where it is; 0 where all went well.

    execute: rerun stale chapters and store their outputs first; without it they are refused.
    out: the folder to build into instead of `_build`; the pages are in its folder `html`.
    wants_pdf: also print the pages into `book.pdf` in that folder, with Chromium.
    """
    if wants_pdf:
        pdf.chromium()  # before anything is built
    pages = toc_pages(book)
    old = stale_chapters(book, pages)
    if old and not execute:
        for slug, why in old.items():
            print(f"book: chapters/{slug}.ipynb is stale: {', '.join(why)}", file=sys.stderr)
        print("book: `book build --execute` reruns them", file=sys.stderr)
        return 1
    for slug in old:
        rerun(slug)
    folder = Path(out).expanduser().resolve() if out else book / "_build"
    print("book: building the pages", flush=True)
    with alone(folder):
        problems = run_sphinx(book, folder)
        if wants_pdf and not problems:
            print("book: printing the PDF", flush=True)
            print(f"The PDF is at {pdf.make(book, folder)}")
    if problems:
        for line in problems:
            print(f"book: {line}", file=sys.stderr)
        print(f"book: the build failed: {len(problems)} problem(s)", file=sys.stderr)
        return 1
    print(f"The book is at {folder / 'html' / 'index.html'}")
    return 0


def toc_pages(book: Path) -> list[Path]:
    """The files that `_toc.yml` names, in order. Raises BookError where one does not exist."""
    try:
        toc = yaml.safe_load((book / "_toc.yml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BookError(f"cannot read _toc.yml: {str(error).splitlines()[0]}") from None
    return [_page(book, name) for name in toc_names(toc)]


def toc_names(node) -> list[str]:
    """The names of pages in `_toc.yml`, or in a part of it, in order."""
    if isinstance(node, list):
        return [name for child in node for name in toc_names(child)]
    if not isinstance(node, dict):
        return []
    own = [node[key] for key in ("root", "file") if isinstance(node.get(key), str)]
    return own + [name for child in node.values() for name in toc_names(child)]


def _page(book: Path, name: str) -> Path:
    for end in ("", ".ipynb", ".md"):
        if (book / f"{name}{end}").is_file():
            return book / f"{name}{end}"
    known = [f"chapters/{path.stem}" for path in (book / "chapters").glob("*.*")]
    raise BookError(f"_toc.yml names {name}, which does not exist{places.nearest(name, known)}")


def stale_chapters(book: Path, pages: list[Path]) -> dict[str, list[str]]:
    """Slug → why, for every notebook among the pages whose outputs are stale."""
    slugs = [path.stem for path in pages if path.suffix == ".ipynb"]
    return {slug: why for slug in slugs if (why := stale.stale(slug, book))}


def rerun(slug: str) -> None:
    """Run a chapter in its default profile and store its outputs."""
    from lib.book import runs

    print(f"book: running {slug}, which is stale")
    runs.run(slug, [], "default", store=True)


@contextlib.contextmanager
def alone(folder: Path):
    """Hold `folder` for one build; raises BookError where another build has it."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".building", timeout=0)
        lock.acquire()
    except Timeout:
        raise BookError(f"another build is running in {folder}; wait for it") from None
    except OSError as error:
        raise BookError(f"cannot build into {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def run_sphinx(book: Path, folder: Path) -> list[str]:
    """Run Jupyter Book; the problems it found, none where the pages are good.

    Sphinx warns about a page only when it reads it, so a second build after warnings would pass.
    What it remembers is therefore thrown away unless the build before this one was good.
    """
    good = folder / ".good"
    memory = folder / ".doctrees"
    if not good.is_file():
        shutil.rmtree(memory, ignore_errors=True)
    good.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "lib.book.build", str(book), str(folder)],
        capture_output=True,
        text=True,
        cwd=places.PACKAGE_ROOT,
        env=_environment(book),
    )
    if done.returncode == 0:
        first = toc_pages(book)[0].relative_to(book).with_suffix(".html").as_posix()
        title = yaml.safe_load((book / "_config.yml").read_text(encoding="utf-8"))["title"]
        front = FRONT.format(title=escape(title), first=first)
        (folder / "html" / "index.html").write_text(front, encoding="utf-8")
        good.touch()
        return []
    shutil.rmtree(memory, ignore_errors=True)
    return readable(done.stderr + done.stdout, book) or [
        f"Jupyter Book ended with {done.returncode}"
    ]


def _environment(book: Path) -> dict[str, str]:
    paths = [str(places.PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "BOOK_ROOT": str(book)}
    # a reader's Python may be set to print deprecations of packages the book does not own
    return {**os.environ, **own, "PYTHONWARNINGS": "ignore", "PYTHONHASHSEED": "0"}


def readable(log: str, book: Path) -> list[str]:
    """The lines of a build's log that name a problem, once each; paths start at the book's root."""
    lines = ANSI.sub("", log).replace(f"{book}{os.sep}", "").splitlines()
    found = [line for line in lines if re.search(r"\b(WARNING|ERROR|CRITICAL|SEVERE)\b", line)]
    if not found:
        found = [line for line in lines if not NOISE.match(line)][-3:]
    return list(dict.fromkeys(CELL.sub(_cell, line.strip()) for line in found))[:40]


def _cell(match: re.Match) -> str:
    cell, line = divmod(int(match[1]), 10_000)
    return f".ipynb: cell {cell - 1}, line {line}:"


def _sphinx(book: Path, folder: Path) -> int:
    """One run of Jupyter Book's own build, in this process; its exit code."""
    from jupyter_book.sphinx import build_sphinx

    result = build_sphinx(
        book,
        folder / "html",
        noconfig=True,
        path_config=book / "_config.yml",
        confoverrides={"external_toc_path": str(book / "_toc.yml"), "latex_individualpages": False},
        warningiserror=True,
        keep_going=True,
        quiet=True,
    )
    return result if isinstance(result, int) else 2


if __name__ == "__main__":
    sys.exit(_sphinx(Path(sys.argv[1]), Path(sys.argv[2])))
