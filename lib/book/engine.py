"""The kernel of a run: papermill's client with the book's environment, progress and memory."""

import os
import tempfile
import threading
from pathlib import Path

import ipykernel.kernelspec
import psutil
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.execute import execute_notebook

from lib.book import places

__all__ = ["Peak", "PapermillExecutionError", "execute_notebook"]
GIB = 2**30


class _ThisInterpreter(KernelSpecManager):
    """Kernels of the interpreter that runs the book, whatever `python3` is registered to be."""

    def get_kernel_spec(self, kernel_name):
        spec = ipykernel.kernelspec.get_kernel_dict()
        spec["metadata"] = {**spec.get("metadata", {}), "supported_encryption": ["curve"]}
        return KernelSpec(resource_dir=ipykernel.kernelspec.RESOURCES, **spec)


class _Kernel(AsyncKernelManager):
    """A kernel reached through sockets in a private folder, where the system has them.

    Two kernels that start together can be given the same TCP port, and a kernel on TCP with no
    keys warns on stderr.
    """

    folder = ""  # set by `execute_notebook`

    def __init__(self, **settings):
        super().__init__(kernel_spec_manager=_ThisInterpreter(), **settings)
        self.transport_encryption = "auto"
        if os.name == "posix":
            self.transport = "ipc"
            self.connection_file = str(Path(self.folder) / "kernel.json")
            self.ip = str(Path(self.folder) / "kernel-ipc")


class Peak:
    """Peak resident memory of a process and its children, sampled ten times a second.

    The kernel's own peak is also read from the system where it keeps one (Linux), so a spike
    between two samples counts.
    """

    def __init__(self):
        self.bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, pid: int) -> None:
        """Start sampling the process `pid`."""
        self._thread = threading.Thread(target=self._sample, args=(pid,), daemon=True)
        self._thread.start()

    def _sample(self, pid: int) -> None:
        while not self._stop.wait(0.1):
            try:
                process = psutil.Process(pid)
                tree = [process, *process.children(recursive=True)]
                self.bytes = max(self.bytes, sum(each.memory_info().rss for each in tree))
                self.bytes = max(self.bytes, _high_water(pid))
            except (psutil.Error, OSError):
                continue

    def stop(self) -> float:
        """End the sampling; the peak in GiB."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        return self.bytes / GIB


def _high_water(pid: int) -> int:
    """Peak resident memory of one process in bytes, as Linux keeps it; 0 elsewhere."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def kernel_environment(book: Path) -> dict[str, str]:
    """The environment of a kernel: offline unless the reader chose otherwise, and repeatable."""
    settings = dict(os.environ)
    settings.setdefault("HF_HUB_OFFLINE", "1")
    settings.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings["PYTHONHASHSEED"] = "0"
    folders = [str(book), str(places.PACKAGE_ROOT), settings.get("PYTHONPATH", "")]
    settings["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, folders)))
    return settings


class _Manager(NotebookExecutionManager):
    """Papermill's execution manager that saves whole files and tells `on_cell` where it is."""

    def __init__(self, notebook, output, on_cell, on_error):
        super().__init__(notebook, progress_bar=False, autosave_cell_every=10)
        self.output, self.on_cell, self.on_error = output, on_cell, on_error

    def save(self, **kwargs):
        self.nb = kwargs.get("nb") or self.nb
        places.write_whole(self.output, places.notebook_text(self.nb))
        self.last_save_time = self.now()

    def cell_start(self, cell, cell_index=None, **kwargs):
        self.on_cell(self.nb, cell_index)
        # Papermill saves before and after each cell; once a cell is enough.
        saved, self.save = self.save, lambda **ignored: None
        try:
            super().cell_start(cell, cell_index, **kwargs)
        finally:
            self.save = saved

    def cell_complete(self, cell, cell_index=None, **kwargs):
        if cell.cell_type == "code":
            super().cell_complete(cell, cell_index, **kwargs)
        else:
            cell.metadata.papermill["status"] = self.COMPLETED

    def cell_exception(self, cell, cell_index=None, exception=None, **kwargs):
        self.on_error(self.nb, cell_index, exception)
        super().cell_exception(cell, cell_index, **kwargs)


class BookEngine(Engine):
    """Papermill engine `book`. Extra arguments: `output`, `book`, `on_cell`, `on_error`, `peak`."""

    @classmethod
    def execute_notebook(cls, nb, kernel_name, output, book, on_cell, on_error, peak, **ignored):
        log = output.with_name("kernel.log")  # what a kernel that dies says
        manager = _Manager(nb, output, on_cell, on_error)
        manager.notebook_start()

        async def watch(**event):
            process = client.km.provisioner.process if client.km else None
            if process is not None:
                peak.watch(process.pid)

        sockets = tempfile.TemporaryDirectory(prefix="book-", ignore_cleanup_errors=True)
        client = PapermillNotebookClient(
            manager,
            kernel_name="python3",
            kernel_manager_class=type("Kernel", (_Kernel,), {"folder": sockets.name}),
            timeout=None,
            startup_timeout=120,
            resources={"metadata": {"path": str(book / "chapters")}},
            on_notebook_start=watch,
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
        )
        try:
            with open(log, "wb") as stderr:
                client.execute(env=kernel_environment(book), stderr=stderr)
            log.unlink()  # it lived to the end; what it said on the way out explains nothing
        finally:
            manager.notebook_complete()
            sockets.cleanup()
            if log.exists() and not log.stat().st_size:
                log.unlink()
        return manager.nb


papermill_engines.register("book", BookEngine)
