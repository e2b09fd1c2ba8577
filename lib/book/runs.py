"""One run of a chapter: checked parameters in, `runs/<chapter>/<id>/` out."""

import contextlib
import copy
import datetime
import secrets
import signal
import sys
import time
from pathlib import Path

import nbformat

from lib.book import params, places, record
from lib.book import store as storing
from lib.book.progress import Progress
from lib.errors import BookError

INTERRUPTED = 130


class RunFailed(BookError):
    """The chapter ran and failed. `code` is the exit code of the command."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def run(
    chapter: str,
    typed: list[str] = (),
    profile: str = "default",
    store: bool = False,
    measure: bool = False,
    book: Path | None = None,
    quiet: bool = False,
    folder: Path | None = None,
) -> Path:
    """Run a chapter in a fresh kernel; the folder of its record.

    typed: `name=value` strings, which beat the profile. store: write the outputs back
    into the chapter, for the default profile alone. measure: note the profile's seconds and
    memory in the chapter. folder: of the record, inside the book; by default a new one in `runs/`.
    Raises BookError before any kernel starts for bad input, and RunFailed
    where the run fails or is interrupted; its record and partial notebook stay.
    """
    book = book or places.root()
    path = places.chapter_path(book, chapter)
    notebook = places.read_notebook(path)
    where = f"chapters/{path.name}"
    parameters = params.read_parameters(notebook, where)
    profiles = notebook.metadata.get("book", {}).get("profiles", {})
    values = params.chosen_values(parameters, profiles, profile, list(typed))
    if typed and (store or measure):
        raise BookError("--store and --measure take no -p: a chapter keeps its own parameters")
    if store and profile != "default":
        raise BookError("--store keeps the default profile's outputs; for others use --measure")
    # From here the record is seconds of imports away: a run that begins leaves one.
    from lib.book import engine

    started = storing.snapshot(book, path.stem, notebook)
    facts = {
        "chapter": path.stem,
        "id": None,
        "status": "running",
        "error": None,
        "profile": profile,
        "parameters": values,
        "seed": values.get("seed"),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": None,
        "peak_gib": None,
        "versions": record.versions(),
        "source": record.source_state(book) | {"parts": started["parts"]},
        "machine": record.machine(),
        "claims": [],
    }
    folder = folder or new_folder(book, path.stem)
    facts["id"] = folder.name
    places.write_json(folder / "run.json", facts)
    changed = {name: value for name, value in values.items() if value != parameters[name].default}
    executed = _execute(engine, book, notebook, changed, folder, facts, quiet)
    if store or measure:
        try:
            if store:
                storing.store(path, started, executed, facts)
            else:
                storing.measure(path, started, facts)
        except BookError as error:
            raise RunFailed(f"{where}: not stored: {error}") from None
    return folder


def new_folder(book: Path, slug: str) -> Path:
    """A new folder `runs/<slug>/<id>/` that no other run has, whenever it starts."""
    try:
        while True:
            stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
            folder = book / "runs" / slug / f"{stamp}-{secrets.token_hex(3)}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    except OSError as error:
        raise BookError(f"cannot make {folder}: {error.strerror}") from None


def _execute(engine, book, notebook, changed, folder, facts, quiet) -> nbformat.NotebookNode:
    """Run the cells, and leave notebook, page and record whatever happens."""
    output = folder / "notebook.ipynb"
    failure: dict = {}
    progress = Progress(quiet)
    peak = engine.Peak()

    def on_error(current, index, exception):
        name, value = getattr(exception, "ename", ""), getattr(exception, "evalue", "")
        last = (str(value).strip() or str(exception).strip()).splitlines()[-1:]
        text = ": ".join(filter(None, [name, *last]))
        failure.update(cell=places.cell_name(current, index), error=text)

    begun = time.monotonic()
    source = _prepared(notebook)
    try:
        with terminate_as_interrupt():
            engine.execute_notebook(
                source,
                None,
                parameters=changed,
                engine_name="book",
                kernel_name="python3",
                progress_bar=False,
                output=output,
                book=book,
                on_cell=progress.cell,
                on_error=on_error,
                peak=peak,
            )
        facts["status"] = "ok"
    except KeyboardInterrupt:
        facts["status"] = "interrupted"
        failure["error"] = "interrupted"
    except engine.PapermillExecutionError as error:
        facts["status"] = "failed"
        failure.setdefault("error", f"{error.ename}: {error.evalue}")
    except Exception as error:  # the kernel died or never started
        facts["status"] = "failed"
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        failure.setdefault("error", last[0])
    with no_interrupt():
        progress.end()
        facts["seconds"] = round(time.monotonic() - begun, 1)
        facts["peak_gib"] = round(peak.stop(), 2)
        facts["error"] = failure.get("error")
        facts["cell"] = failure.get("cell") or (progress.now if failure else None)
        executed = _finished(output, folder, facts)
    if facts["status"] == "ok":
        return executed
    partial = output.relative_to(book)
    if facts["status"] == "interrupted":
        raise RunFailed(f"interrupted in {facts['cell']}; kept {partial}", INTERRUPTED)
    place = facts["cell"] or "the kernel did not start"
    raise RunFailed(f"{facts['chapter']} failed in {place}: {facts['error']}; kept {partial}")


def _prepared(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The chapter as papermill takes it: no outputs, and the kernel this book uses."""
    source = copy.deepcopy(notebook)
    source.metadata["kernelspec"] = dict(storing.KERNEL)
    source.metadata["language_info"] = dict(storing.LANGUAGE)
    source.metadata.setdefault("papermill", {})
    return source


def _finished(output: Path, folder: Path, facts: dict) -> nbformat.NotebookNode | None:
    """Write the final record, then the page, beside the notebook."""
    from lib.book import page

    executed = None
    if output.is_file():
        executed = places.read_notebook(output)
        facts["claims"] = record.claims(executed)
    places.write_json(folder / "run.json", facts)
    if executed is not None:
        try:
            text = page.html(executed, facts["chapter"])
            places.write_whole(folder / "notebook.html", text)
        except Exception as error:  # a page that cannot be drawn takes nothing from the run
            print(f"book: no notebook.html: {error}", file=sys.stderr)
    return executed


@contextlib.contextmanager
def terminate_as_interrupt():
    """SIGTERM ends a run as Ctrl-C does, with its record."""

    def stop(*ignored):
        raise KeyboardInterrupt

    with _handler(signal.SIGTERM, stop):
        yield


@contextlib.contextmanager
def no_interrupt():
    """A second Ctrl-C waits for the record; it takes about a second."""
    with _handler(signal.SIGINT, signal.SIG_IGN), _handler(signal.SIGTERM, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handler(number, action):
    try:
        before = signal.signal(number, action)
    except ValueError:  # not in the main thread, where signals do not arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, before)
