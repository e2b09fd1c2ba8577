"""The process of one point of a sweep: `python -m lib.book.sweep_point ORDER.json`.

Started by `sweep_ship` on a worker, in the worker's copy of the book. Exit codes as of `book run`.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

from lib.book import places, runs
from lib.errors import BookError


def main(order: str) -> int:
    """Run the chapter as the order says; its record goes into the folder the order names."""
    # A worker of a local sweep does not hear Ctrl-C; the kernel must, to be interrupted.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _end_with_the_worker()
    asked = json.loads(Path(order).read_text(encoding="utf-8"))
    try:
        runs.run(
            asked["slug"], asked["typed"], asked["profile"], book=places.root(), quiet=True,
            folder=Path(asked["folder"]),
        )  # fmt: skip
    except BookError as error:
        print(error, file=sys.stderr)
        return getattr(error, "code", 2)
    return 0


def _end_with_the_worker() -> None:
    """End as Ctrl-C would when the pipe on stdin closes: the worker at its other end is gone."""

    def wait():
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
