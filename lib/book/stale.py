"""What a chapter's outputs were made of, and which of it has changed since.

The parts are the chapter's code cells, the modules of `lib` it imports (and those they import),
the data files it names, the bibliography entries it cites and the lock file. Each has a short
digest in the chapter's metadata, so a stale chapter says why. Outputs are no part of it, nor are
comments and docstrings of `lib`: rewording one reruns nothing.
"""

import ast
import hashlib
import io
import json
import re
import tokenize
from pathlib import Path

import nbformat

from lib.book import places

LOCK = "requirements.lock"


def stale(slug: str, book: Path | None = None) -> list[str]:
    """Why the stored outputs of a chapter are stale; empty where they are fresh.

    Reasons are names of parts (`code`, `lib/hooks.py`, `data/…`, `lock`) or `never stored`.
    """
    book = book or places.root()
    return reasons(book, slug, places.read_notebook(places.chapter_path(book, slug)))


def reasons(book: Path, slug: str, notebook: nbformat.NotebookNode) -> list[str]:
    """As `stale`, for a chapter that is already read."""
    before = notebook.metadata.get("book", {}).get("last_run", {}).get("parts")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not before or not any(cell.get("outputs") or cell.execution_count for cell in code):
        return ["never stored"]
    now = parts(book, slug, notebook)
    changed = [name for name in now if before.get(name) != now[name]]
    return changed + [f"{name} (gone)" for name in before if name not in now]


def digest(parts: dict[str, str]) -> str:
    """One sha256 over all parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def parts(book: Path, slug: str, notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Name → first 12 hex digits of the sha256 of everything that a chapter's outputs rest on."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    found = {"code": _short("\0".join(cells).encode())}
    modules, data = rests_on(book, slug, cells)
    for path in modules:
        text = without_comments(path.read_text(encoding="utf-8"))
        found[path.relative_to(book).as_posix()] = _short(text.encode())
    for path in data:
        found[path.relative_to(book).as_posix()] = _short(_normal(path))
    if (book / LOCK).is_file():
        found["lock"] = _short(_normal(book / LOCK))
    return found


def rests_on(book: Path, slug: str, cells: list[str]) -> tuple[list[Path], list[Path]]:
    """Modules of `lib` and data files that a chapter's code and its own makers need."""
    own = [path for path in data_files(book, slug, "") if path.suffix == ".py"]
    sources = cells + [path.read_text(encoding="utf-8") for path in own]
    modules = closure(book, sources)
    sources += [without_comments(path.read_text(encoding="utf-8")) for path in modules]
    return modules, data_files(book, slug, "\n".join(sources))


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _normal(path: Path) -> bytes:
    """A file's bytes; text with Unix line ends, so that a checkout on Windows is the same."""
    content = path.read_bytes()
    return content if b"\0" in content[:8192] else content.replace(b"\r\n", b"\n")


def closure(book: Path, sources: list[str]) -> list[Path]:
    """Files of the book's `lib` that the sources import, directly or through each other."""
    todo = [name for source in sources for name in imported(source, ())]
    files: dict[Path, None] = {}
    seen: set[tuple[str, ...]] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for path in _files_of(book, name):
            if path not in files:
                files[path] = None
                package = path.relative_to(book).parent.parts
                todo += imported(path.read_text(encoding="utf-8"), package)
    return sorted(files)


def imported(source: str, package: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Dotted names under `lib` that a source imports anywhere, also inside its functions.

    package: the package that relative imports start from, `("lib", "kernels")`.
    """
    try:
        # Line magics are no Python; a chapter's other lines still count.
        tree = ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source))
    except SyntaxError:
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names |= {base} | {(*base, alias.name) for alias in node.names}
    return {name for name in names if name and name[0] == "lib"}


def _files_of(book: Path, name: tuple[str, ...]) -> list[Path]:
    """The files that importing a dotted name runs. A package below `lib` counts whole, because
    its modules may be imported by a name made at run time."""
    files = []
    for depth in range(1, len(name) + 1):
        folder = book.joinpath(*name[:depth])
        if folder.is_dir():
            files += folder.glob("*.py") if depth > 1 else folder.glob("__init__.py")
        elif folder.with_suffix(".py").is_file():
            files.append(folder.with_suffix(".py"))
    return files


def without_comments(source: str) -> str:
    """Python source without its comments, docstrings and blank lines."""
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return source
    lines = source.splitlines()
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            if isinstance(first.value.value, str):
                for row in range(first.lineno, first.end_lineno + 1):
                    lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def data_files(book: Path, slug: str, sources: str) -> list[Path]:
    """Files under `data/` that a chapter rests on.

    Those in `data/<slug>/`; the whole of another folder that the sources name in a path; and
    files outside folders that they name, with or without the ending. Makers (`make_*.py`) count:
    `full` retrains through them.
    """
    folder = book / "data"
    own = slug.replace("-", "_")
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "__pycache__")) for part in parts)
        if not path.is_file() or hidden or path.suffix in (".md", ".bib"):
            continue
        if len(parts) == 1:
            stem = re.search(rf"[\"']{re.escape(path.stem)}[\"']", sources)
            wanted = path.name in sources or stem
        else:
            name = re.escape(parts[0])
            room = re.search(rf"/ ?[\"']?{name}[\"'/]|[\"']{name}/", sources)
            wanted = parts[0] in (slug, own) or room
        if wanted:
            found.append(path)
    return found
