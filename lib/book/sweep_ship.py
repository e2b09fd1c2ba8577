"""What travels to a Dask worker, and what comes back.

A worker needs the book's packages installed and nothing else: the chapter, the modules and data
it rests on and this package go to it as one zip, in a worker plugin. Each point is a process of
its own there, in that copy; its record comes back as the bytes of a zip, so no file system is
shared. The class and the task are pickled by value: a worker need not be able to import this file.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
import zipfile
from pathlib import Path

from distributed import WorkerPlugin

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class BookFiles(WorkerPlugin):
    """Unpacks the book on each worker, and runs points there.

    The copy lies beside the workers' own folders: workers of one machine share it, and one that
    was killed finds it again.
    """

    def __init__(self, name: str, content: bytes):
        self.name, self.content = name, content
        self.folder, self.running, self.guard = None, None, None

    def setup(self, worker) -> None:
        """Called by Dask when the worker joins."""
        self.running, self.guard = set(), threading.Lock()
        above = Path(worker.local_directory).parent
        self.folder = above / self.name
        if self.folder.is_dir():
            return
        fresh = Path(tempfile.mkdtemp(dir=above, prefix=f".{self.name}-"))
        with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
            archive.extractall(fresh)
        try:
            fresh.rename(self.folder)
        except OSError:  # another worker was first
            shutil.rmtree(fresh, ignore_errors=True)

    def teardown(self, worker) -> None:
        """Called by Dask when the worker closes or the sweep ends: its points stop."""
        with self.guard:
            processes, self.running = list(self.running), None
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)

    def run(self, spec: dict) -> dict:
        """Run one point to its end: `{"code", "said", "record"}`, the record as a zip's bytes.

        spec: slug, typed (`name=value` strings), files (parameter → path in the copy), profile,
        environment. The point holds the other end of a pipe, so it ends when this process dies.
        """
        name = uuid.uuid4().hex
        book, tool = self.folder / "book", self.folder / "tool"
        record = book / "runs" / spec["slug"] / name
        record.mkdir(parents=True)
        order, said = record.with_suffix(".json"), record.with_suffix(".log")
        typed = [f"{key}={self.folder / path}" for key, path in spec["files"].items()]
        task = {"slug": spec["slug"], "typed": spec["typed"] + typed, "profile": spec["profile"]}
        order.write_text(json.dumps(task | {"folder": str(record)}), encoding="utf-8")
        environment = {**os.environ, **spec["environment"]}
        environment |= {"PYTHONPATH": str(tool), "BOOK_ROOT": str(book)}
        try:
            with open(said, "wb") as log, self.guard:
                if self.running is None:
                    raise RuntimeError("the worker is closing")
                process = subprocess.Popen(
                    [sys.executable, "-m", "lib.book.sweep_point", str(order)],
                    stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                    env=environment, cwd=tool, start_new_session=True,
                )  # fmt: skip
                self.running.add(process)
            code = process.wait()
            process.stdin.close()
            with self.guard:
                (self.running or set()).discard(process)
            lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return {"code": code, "said": lines[-1] if lines else "", "record": zipped(record)}
        finally:
            shutil.rmtree(record, ignore_errors=True)
            for path in (order, said):
                path.unlink(missing_ok=True)


def zipped(folder: Path) -> bytes:
    """The files of a folder as the bytes of a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
    return buffer.getvalue()


def task(name: str):
    """The function that Dask runs for a point. Made inside another, so that it goes by value."""

    def run_point(spec: dict) -> dict:
        from distributed import get_worker

        return get_worker().plugins[name].run(spec)

    return run_point


def by_value() -> None:
    """Let the classes of this module travel whole."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


def removal(name: str):
    """The function that takes the copy away from a worker's machine."""

    def remove_copy(dask_worker) -> None:
        import shutil
        from pathlib import Path

        shutil.rmtree(Path(dask_worker.local_directory).parent / name, ignore_errors=True)

    return remove_copy
