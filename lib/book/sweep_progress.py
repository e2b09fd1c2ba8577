"""The lines that say how far a sweep is."""

import shutil
import sys
import time
from collections import Counter

BAR = 24


class Progress:
    """One line, rewritten in place on a terminal; elsewhere printed at each tenth of the points."""

    def __init__(self, total: int, quiet: bool = False):
        self.total, self.quiet, self.terminal = total, quiet, sys.stdout.isatty()
        self.retried, self.printed, self.begun, self.before = 0, -1, time.monotonic(), 0

    def begin(self, plan, state: dict, left: int) -> None:
        """Say what the sweep is."""
        self.before = self.total - left
        sizes = " × ".join(f"{name} {len(values)}" for name, values in plan.axes.items())
        text = f"sweep {state['sweep']} of {plan.slug}: {_points(self.total)}"
        text += f" ({sizes})" if sizes else ""
        text += f", {plan.repeated} equal to others left out" if plan.repeated else ""
        text += f", {self.before} finished before" if self.before else ""
        self._say(text)

    def connected(self, name: str, threads: int, dashboard: str | None) -> None:
        """Say where the points run."""
        local = " local worker" in name
        where = f"on {name}" if local else f"on the cluster at {name}"
        where += f", {threads} threads a point" if local and threads > 1 else ""
        self._say(where + (f"; dashboard {dashboard}" if dashboard else ""))

    def failed(self, label: str, point: dict) -> None:
        """Say that a point failed for good."""
        self._clear()
        self._say(f"failed: {label}: {point['error']}")

    def show(self, states: list[str], counts: dict) -> None:
        """The line itself."""
        if self.quiet:
            return
        count = Counter(states)
        ended = count["ok"] + count["failed"]
        parts = [f"{ended}/{self.total}"]
        named = {"failed": count["failed"], "running": counts["running"],
                 "in another sweep": counts["elsewhere"], "retried": self.retried}  # fmt: skip
        parts += [f"{number} {name}" for name, number in named.items() if number]
        parts.append(f"{counts['workers']} worker{'' if counts['workers'] == 1 else 's'}")
        spent, fresh = time.monotonic() - self.begun, ended - self.before
        if fresh > 0 and ended < self.total:
            parts.append(f"about {_clock(spent / fresh * (self.total - ended))} left")
        if self.terminal:
            full = BAR * ended // self.total
            line = f"{'█' * full}{'░' * (BAR - full)} {', '.join(parts)}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width].ljust(width)}", end="", flush=True)
        elif 10 * ended // self.total > self.printed:
            self.printed = 10 * ended // self.total
            print(", ".join(parts), flush=True)

    def end(self) -> None:
        """Leave the terminal on a line of its own."""
        self._clear()

    def _clear(self) -> None:
        if self.terminal and not self.quiet:
            print(f"\r{' ' * (shutil.get_terminal_size().columns - 1)}\r", end="", flush=True)

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)


def _points(number: int) -> str:
    return f"{number} point{'' if number == 1 else 's'}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
