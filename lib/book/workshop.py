"""`book workshop`: a session made from chapters, to hand out, to teach from and to show.

The folder that it fills:

    README.md           what is what, and the plan
    student/            notebooks without solutions, lib/, data/, requirements, README.md
    student.zip         the same, to hand out
    instructor/         notebooks with solutions, plan and notes; slides with reveal.js
    instructor.zip      the same
"""

import shutil
from pathlib import Path

from lib.book import chapter as chapters
from lib.book import places, workshop_edition, workshop_pack, workshop_slides
from lib.book.workshop_exercises import pasted
from lib.book.workshop_plan import Plan, plan, shares
from lib.errors import BookError

REVEAL = Path(__file__).parent / "reveal"


def make(book: Path, names: list[str], minutes: int, out: Path) -> list[Plan]:
    """Write a workshop on the chapters `names` into the new or empty folder `out`.

    Nothing is left in `out` where it fails. Raises BookError for an unknown chapter, one named
    twice, minutes other than 45, 90 or 180, too few of them, a chapter that is not complete, and
    a folder that is not empty or cannot be written.
    """
    paths = [places.chapter_path(book, name) for name in names]
    slugs = [path.stem for path in paths]
    for slug in slugs:
        if slugs.count(slug) > 1:
            raise BookError(f"chapter {slug} is named twice")
    each, breaks, pause = shares(minutes, len(slugs))
    read = [chapters.read(book, slug) for slug in slugs]
    plans = [plan(chapter, each, breaks, pause) for chapter in read]
    for one in plans:
        for exercise in one.exercises:  # before anything is written
            pasted(one.chapter, exercise)
    fresh = _folder(out)
    try:
        _fill(out, plans, minutes)
    except BaseException as error:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if fresh:
            out.rmdir()
        if isinstance(error, OSError):
            raise BookError(f"cannot write {out}: {error.strerror or error}") from None
        raise
    return plans


def _folder(out: Path) -> bool:
    """Make `out`; True where it was not there."""
    try:
        if out.exists() and not out.is_dir():
            raise BookError(f"{out} is a file: name a new or empty folder")
        if out.is_dir() and any(out.iterdir()):
            raise BookError(f"{out} is not empty: name a new or empty folder")
        fresh = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
        return fresh
    except OSError as error:
        raise BookError(f"cannot write {out}: {error.strerror or error}") from None


def _fill(out: Path, plans: list[Plan], minutes: int) -> None:
    for name, edition in (
        ("student", workshop_edition.student),
        ("instructor", workshop_edition.instructor),
    ):
        folder = out / name
        folder.mkdir()
        notebooks = {p.chapter.slug: places.notebook_text(edition(p)) for p in plans}
        workshop_pack.write(folder, plans, notebooks, name)
    for one in plans:
        target = out / "instructor" / f"{one.chapter.slug}.slides.html"
        places.write_whole(target, workshop_slides.html(one))
    for name, path in workshop_slides.FILES.items():
        workshop_pack.copy(REVEAL / name, out / "instructor" / workshop_slides.FOLDER / path)
    for name in ("student", "instructor"):
        workshop_pack.zipped(out / name, out / f"{name}.zip")
    places.write_whole(out / "README.md", overview(plans, minutes))


def overview(plans: list[Plan], minutes: int) -> str:
    """The README of the whole folder: what is what, and the plan of each chapter."""
    lines = [
        f"# Workshop, {minutes} minutes",
        "",
        "- `student.zip`: hand this out. Its README.md says how to start.",
        "- `instructor.zip`: for you, with solutions, notes and slides.",
        "- `student/` and `instructor/`: the same, unpacked.",
    ]
    for one in plans:
        lines += ["", f"## {workshop_edition.title(one.chapter)}", ""]
        lines.append(workshop_edition.session(one, teach=True))
    return "\n".join(lines) + "\n"
