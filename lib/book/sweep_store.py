"""What a sweep keeps on disk, so that nothing finished is lost and nothing is run twice.

A finished point is the folder `runs/<chapter>/<point's key>/`, moved there whole: where it exists
the point is done, for every sweep. While a point runs, its sweep holds a lock on
`runs/<chapter>/sweeps/.claims/<key>`; the system frees the lock of a process that dies.
`runs/<chapter>/sweeps/<id>/` holds `sweep.json`, `source.zip` (what the points run, so that an edit
in between changes nothing) and the result page and tables.
"""

import contextlib
import fcntl
import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from lib.book import places, record, runs
from lib.errors import BookError

MAX_SENT = 50_000_000  # bytes of a file or folder that travels with a sweep


class Lock:
    """A lock on a file, held by this process until `free` or its end."""

    def __init__(self, path: Path):
        self.path, self.handle = path, None

    def take(self) -> bool:
        """Whether this process has it now; never waits."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its holder may have removed the file between our two lines.
                if os.fstat(handle).st_ino == os.stat(self.path).st_ino:
                    self.handle = handle
                    return True
            except BlockingIOError:
                os.close(handle)
                return False
            except FileNotFoundError:
                pass
            except OSError as error:
                os.close(handle)
                raise BookError(f"cannot lock {self.path}: {error.strerror}") from None
            os.close(handle)

    def free(self) -> None:
        """Let it go, and remove the file."""
        if self.handle is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self.handle)
            self.handle = None


class Store:
    """The runs of one chapter, as a sweep reads and adds to them."""

    def __init__(self, book: Path, slug: str, sweep: str):
        self.book, self.slug = book, slug
        self.runs = book / "runs" / slug
        self.folder = self.runs / "sweeps" / sweep
        self.claims: dict[str, Lock] = {}
        self.own = Lock(self.folder / "lock")

    def open(self) -> None:
        """Make this process the only one that works on the sweep."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BookError(f"cannot make {self.folder}: {error.strerror}") from None
        if not self.own.take():
            raise BookError(f"sweep {self.folder.name} is running already")
        for path in self.runs.glob(f".{self.folder.name}-*"):  # half a commit of a killed sweep
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Give every lock back."""
        for key in list(self.claims):
            self.release(key)
        self.own.free()

    def keep(self, name: str, content: bytes) -> None:
        """Write a file of the sweep's folder whole."""
        fresh = self.folder / f".{name}.tmp"
        try:
            fresh.write_bytes(content)
            fresh.replace(self.folder / name)
        except OSError as error:
            raise BookError(f"cannot write {self.folder / name}: {error.strerror}") from None

    def finished(self, key: str) -> dict | None:
        """The record of a finished point, or None."""
        folder = self.runs / key
        if not folder.is_dir():
            return None
        with contextlib.suppress(BookError):
            facts = record.read(folder)
            if facts.get("status") == "ok":
                return facts
        raise BookError(f"{folder.relative_to(self.book)} is damaged: delete it and sweep again")

    def claim(self, key: str) -> bool:
        """Take a point for this sweep; False while another sweep has it."""
        lock = Lock(self.runs / "sweeps" / ".claims" / key)
        if not lock.take():
            return False
        self.claims[key] = lock
        return True

    def release(self, key: str) -> None:
        """Give a claimed point back."""
        self.claims.pop(key).free()

    def commit(self, key: str, content: bytes, changes: dict) -> dict | None:
        """Move a run's record into place whole; the record, or None where it holds no run.json.

        content: the record's folder as a zip. changes: what the run's own machine could not know.
        A run that failed gets a folder under a new name, as `book run` gives one, and the point
        stays open.
        """
        fresh = Path(tempfile.mkdtemp(dir=self.runs, prefix=f".{self.folder.name}-"))
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                archive.extractall(fresh)
            if not (fresh / "run.json").is_file():
                return None
            facts = record.read(fresh)
            if facts["status"] == "ok":
                target = self.runs / key
            else:
                target = runs.new_folder(self.book, self.slug)  # empty, so it may be replaced
            facts["source"] |= changes.pop("source", {})
            facts |= {"id": target.name, "point": key} | changes
            places.write_json(fresh / "run.json", facts)
            fresh.chmod(0o755)
            for path in fresh.iterdir():
                _to_disk(path)
            fresh.rename(target)
            _to_disk(self.runs)
            return facts
        except OSError as error:
            raise BookError(f"cannot keep {self.runs / key}: {error.strerror}") from None
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Wait until what was written is on the disk: a finished run outlives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def bundle(book: Path, slug: str, parts: dict[str, str]) -> bytes:
    """What the points run, as a zip: `book/` (the chapter and all it rests on) and `tool/`."""
    chapter = places.read_notebook(book / "chapters" / f"{slug}.ipynb")
    for cell in chapter.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    tool = [places.PACKAGE_ROOT / "lib" / name for name in ("__init__.py", "errors.py")]
    tool += sorted((places.PACKAGE_ROOT / "lib" / "book").glob("*.py"))
    own = [book / name for name in [*parts, "data/papers.bib", "requirements.lock"] if "." in name]
    named = [(f"book/{path.relative_to(book).as_posix()}", path) for path in own]
    named += [(f"tool/{path.relative_to(places.PACKAGE_ROOT).as_posix()}", path) for path in tool]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"book/chapters/{slug}.ipynb", places.notebook_text(chapter))
        for name, path in named:
            if path.is_file():
                archive.write(path, name)
    return buffer.getvalue()


def with_files(content: bytes, files: list[str]) -> tuple[bytes, dict[str, str]]:
    """The bundle with small files and folders of this machine in it; where each then lies.

    Larger ones stay away: the workers must see them under the path that they have here.
    """
    buffer, places_there = io.BytesIO(content), {}
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        for number, name in enumerate(files):
            top = Path(name)
            inside = [path for path in ([top, *top.rglob("*")]) if path.is_file()]
            if sum(path.stat().st_size for path in inside) > MAX_SENT:
                continue
            for path in inside:
                archive.write(path, f"given/{number}/{path.relative_to(top.parent).as_posix()}")
            places_there[name] = f"given/{number}/{top.name}"
    return buffer.getvalue(), places_there
