"""`book sweep`: many runs of one chapter, on a Dask cluster; interrupted, it goes on later."""

import contextlib
import os
import sys
import time
from pathlib import Path

from lib.book import places, runs, sweep_plan, sweep_state, sweep_store
from lib.book.sweep_progress import Progress
from lib.errors import BookError

SAVE_EVERY = 2.0  # seconds; the truth of a finished point is its folder, not sweep.json
PAGE_EVERY = 10.0


def sweep(
    chapter: str | None,
    typed: list[str] = (),
    seeds: int | None = None,
    profile: str = "default",
    scheduler: str | None = None,
    workers: int | None = None,
    resume: str | None = None,
    book: Path | None = None,
    quiet: bool = False,
) -> dict:
    """Run every point that is not finished; the sweep's state, as in its `sweep.json`.

    typed: `name=a,b,c` strings. scheduler: address of a Dask scheduler; by default a cluster of
    `workers` processes on this machine. resume: the id of a sweep, instead of all else. Raises
    BookError for bad input before anything starts, and RunFailed where the sweep is interrupted.
    """
    book = book or places.root()
    if workers is not None and (workers < 1 or scheduler):
        raise BookError(
            "--workers and --scheduler: give one of them" if scheduler else
            f"--workers {workers}: give 1 or more"
        )  # fmt: skip
    if resume:
        if chapter or typed or seeds is not None or profile != "default":
            raise BookError("--resume takes a sweep's id alone: it knows its points")
        plan, content, state = sweep_state.resumed(sweep_state.folder_of(book, resume))
        store = sweep_store.Store(book, plan.slug, state["sweep"])
    else:
        if not chapter:
            raise BookError("name a chapter, or a sweep with --resume")
        slug, notebook = sweep_plan.read_chapter(book, chapter)
        plan, content = sweep_plan.make(book, slug, notebook, list(typed), seeds, profile), None
        store, state = (
            sweep_store.Store(book, slug, plan.id),
            sweep_state.begun(book, plan, notebook),
        )
        with contextlib.suppress(BookError):
            state["started"] = sweep_state.read(store.folder)["started"]
    if scheduler:
        from lib.book import sweep_dask

        sweep_dask.check(scheduler)
    store.open()
    try:
        with runs.terminate_as_interrupt():
            return Sweep(book, plan, store, state, scheduler, workers, quiet).run(content)
    finally:
        store.close()


class Sweep:
    """A sweep that runs: its plan, its state, and where it keeps them."""

    def __init__(self, book, plan, store, state, scheduler, workers, quiet):
        self.book, self.plan, self.store, self.state = book, plan, store, state
        self.scheduler, self.workers = scheduler, workers
        self.points = {each["key"]: each for each in state["points"]}
        self.records: dict[str, dict] = {}
        self.progress = Progress(len(self.points), quiet)
        self.saved = self.drawn = time.monotonic()

    def run(self, content: bytes | None) -> dict:
        """Run what is not finished, and leave state, page and tables whatever happens."""
        for key in self.points:
            self._finished(key)
        left = [key for key, point in self.points.items() if point["state"] != "ok"]
        self.state |= {"state": "running" if left else "complete", "scheduler": self.scheduler}
        if left:
            if content is None:
                content = sweep_store.bundle(self.book, self.plan.slug, self.plan.parts)
                self.store.keep("source.zip", content)
            for key in left:
                self.points[key] |= {"state": "waiting", "error": None}
        self.save()
        self.progress.begin(self.plan, self.state, len(left))
        try:
            if left:
                self._compute(left, content)
            failed = any(point["state"] != "ok" for point in self.points.values())
            self.state["state"] = "incomplete" if failed else "complete"
        except KeyboardInterrupt:
            self.state["state"] = "interrupted"
            raise runs.RunFailed(f"interrupted; {self._how_to_go_on()}", runs.INTERRUPTED) from None
        except BookError as error:
            self.state["state"] = "interrupted"
            raise runs.RunFailed(f"{error}; {self._how_to_go_on()}") from None
        finally:
            with runs.no_interrupt():
                self.progress.end()
                if self.state["state"] == "running":  # an error of our own
                    self.state["state"] = "interrupted"
                for point in self.points.values():
                    if point["state"] in ("running", "elsewhere"):
                        point["state"] = "waiting"
                self.state["ended"] = sweep_state.now()
                if self.state["state"] == "complete":
                    (self.store.folder / "source.zip").unlink(missing_ok=True)
                self.save()
                self.draw(tables=True)
        return self.state

    def _how_to_go_on(self) -> str:
        done = sum(point["state"] == "ok" for point in self.points.values())
        kept = f"{done} of {len(self.points)} points are kept"
        return f"{kept}, `book sweep --resume {self.state['sweep']}` goes on"

    def _compute(self, left: list[str], content: bytes) -> None:
        from lib.book import sweep_dask

        values = {point.key: point.values for point in self.plan.points}
        there: dict[str, str] = {}
        if self.scheduler:
            files = [name for names in self.plan.files.values() for name in names]
            content, there = sweep_store.with_files(content, files)
        orders = {}
        for key in left:
            sent = {name: there[value] for name, value in values[key].items()
                    if name in self.plan.files and value in there}  # fmt: skip
            stay = {name: value for name, value in values[key].items() if name not in sent}
            orders[key] = {"slug": self.plan.slug, "profile": self.plan.profile, "files": sent,
                           "typed": sweep_plan.typed_of(stay)}  # fmt: skip
        workers, threads = sweep_dask.size(len(left), self.workers, self.state.get("peak_gib"))
        with sweep_dask.cluster(self.scheduler, workers, threads) as on:
            self.progress.connected(on.name, threads, on.dashboard)
            sweep_dask.run(on, content, orders, self.claim, self.done, self.tick)

    def _finished(self, key: str) -> bool:
        """Whether the point is finished, by whichever sweep; its record is then read."""
        facts = self.store.finished(key)
        if facts is None:
            return False
        self.records[key] = facts
        self.points[key] |= {"state": "ok", "run": key, "seconds": facts["seconds"], "error": None}
        return True

    def claim(self, key: str) -> str:
        """Whether this sweep may run the point now. See `sweep_dask.run`."""
        if key in self.store.claims:  # a second try
            self.points[key]["state"] = "running"
            return "mine"
        if not self.store.claim(key):
            self.points[key]["state"] = "elsewhere"
            return "elsewhere"
        if self._finished(key):
            self.store.release(key)
            return "finished"
        self.points[key]["state"] = "running"
        return "mine"

    def done(self, key: str, outcome: dict) -> bool:
        """Keep what came back from a worker; False where the point should be tried again."""
        with runs.no_interrupt():
            point, facts = self.points[key], None
            if outcome["code"] in (0, 1):
                source = {name: self.state["source"][name] for name in ("commit", "dirty")}
                own = next(each.values for each in self.plan.points if each.key == key)
                changes = {"source": source, "parameters": own, "sweep": self.state["sweep"]}
                if outcome["code"] == 0 or outcome["tries"] > 1 or not _died(outcome):
                    facts = self.store.commit(key, outcome["record"], changes)
            point["tries"] = outcome["tries"]
            if facts and facts["status"] == "ok":
                self._finished(key)
            elif facts or outcome["code"] == 2 or outcome["last"]:
                said = facts["error"] if facts else outcome["said"] or "its process was killed"
                times = "" if outcome["tries"] == 1 else f" ({outcome['tries']} times)"
                run = facts["id"] if facts else None
                point |= {"state": "failed", "run": run, "error": f"{said}{times}"}
                self.progress.failed(sweep_plan.label(point["parameters"], self.plan.axes), point)
            else:
                point["state"] = "waiting"
                self.progress.retried += 1
                return False
            self.store.release(key)
            return True

    def tick(self, counts: dict) -> None:
        """Twice a second: the line, and now and then the files."""
        states = [point["state"] for point in self.points.values()]
        self.progress.show(states, counts)
        now = time.monotonic()
        if now - self.saved > SAVE_EVERY:
            self.save()
            self.saved = now
        if now - self.drawn > max(PAGE_EVERY, len(self.points) / 50):
            self.draw()
            self.drawn = now

    def save(self) -> None:
        """Write `sweep.json`."""
        places.write_json(self.store.folder / "sweep.json", self.state)

    def draw(self, tables: bool = False) -> None:
        """Write the result page, and the tables at the end; a failure takes nothing from a run."""
        from lib.book import sweep_page, sweep_table

        try:
            page = sweep_page.html(self.state, self.records)
            places.write_whole(self.store.folder / "index.html", page)
            if tables:
                rows = sweep_table.rows(self.state, self.records)
                sweep_table.write(rows, self.store.folder)
        except Exception as error:
            if os.environ.get("BOOK_DEBUG"):
                raise
            print(f"book: no result page: {error}", file=sys.stderr)


def _died(outcome: dict) -> bool:
    """Whether the point's kernel was killed, for want of memory as a rule: worth one more try."""
    return "Kernel died" in outcome["said"]
