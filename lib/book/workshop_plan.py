"""Which parts of a chapter a session of so many minutes takes, and when each of them begins.

A part's minutes are those it states: an exercise in its title, a section by `(12 min)` at the end
of its heading or by `**Time: 12 minutes.**` in one of its cells tagged `instructor`. A section
that states none is estimated: 75 words of prose a minute and one and a half minutes for each code
cell that is not folded, at least 5.
"""

import math
import re
from dataclasses import dataclass, replace

from lib.book.chapter import Chapter, Section, tags
from lib.book.workshop_exercises import Exercise, find, rests_on
from lib.errors import BookError

LENGTHS = (45, 90, 180)
BREAKS = {45: 0, 90: 1, 180: 2}
BREAK_MINUTES = {45: 0, 90: 5, 180: 10}
OPENING = 5  # minutes, in which everything starts and runs
STRETCH = {"Explore": 15, "What held up": 15}  # minutes: from 5 up to here, as time allows
LEAST = 40  # minutes a chapter, where a session has several
WORDS, CELL, LEAST_SECTION = 75, 1.5, 5
PRACTICE = 0.45  # of a session's minutes are for exercises at most
TIME = re.compile(r"\((\d+) min\)\s*$")
STATED = re.compile(r"\*\*Time: (\d+) min(?:utes)?\.?\*\*")
FRAME = ("The idea", "Explore", "What held up")
NO_TIME = ("Parameters", "Exercises", "Further reading")


@dataclass(frozen=True)
class Part:
    """A part of a session: `kind` is opening, section, exercise, break or closing."""

    kind: str
    title: str
    minutes: int
    begins: int = 0
    section: Section | None = None
    exercise: Exercise | None = None

    @property
    def clock(self) -> str:
        """`0:05–0:12`, counted from the session's start."""
        ends = self.begins + self.minutes
        return f"{self.begins // 60}:{self.begins % 60:02}–{ends // 60}:{ends % 60:02}"


@dataclass(frozen=True)
class Plan:
    """A session on one chapter. `reading` and `homework` are what is left out of it."""

    chapter: Chapter
    minutes: int
    parts: tuple[Part, ...]
    exercises: tuple[Exercise, ...]
    reading: tuple[tuple[Section, int], ...]
    homework: tuple[Exercise, ...]

    def part_of(self, section: Section) -> Part | None:
        """The session's part that is this section, or None where it is left out."""
        return next((part for part in self.parts if part.section == section), None)


def section_minutes(chapter: Chapter, section: Section) -> int:
    """The minutes that a section states, or the estimate."""
    stated = TIME.search(section.title)
    if stated:
        return int(stated[1])
    words = shown = 0
    for cell in chapter.cells[section.start : section.end]:
        if "instructor" in tags(cell):
            said = STATED.search(cell.source)
            if said:
                return int(said[1])
        elif cell.cell_type == "markdown":
            words += len(cell.source.split())
        else:
            shown += not {"hide-input", "hide-cell", "remove-cell"} & set(tags(cell))
    return max(LEAST_SECTION, math.ceil(words / WORDS + CELL * shown))


def plan(chapter: Chapter, minutes: int, breaks: int = 0, pause: int = 0) -> Plan:
    """The route through a chapter for a session of `minutes` with so many breaks.

    The opening, the idea, the panel and the closing are always there. Then exercises are taken in
    order, each with the sections it rests on, while they fit and are under `PRACTICE` of the time;
    then other sections in order. What is left goes to the closing and the panel, then to
    questions. Raises BookError where no exercise fits.
    """
    exercises = find(chapter)
    if not exercises:
        raise BookError(f"chapters/{chapter.slug}.ipynb has no exercises: a workshop needs one")
    timed = {s: section_minutes(chapter, s) for s in chapter.sections if s.title not in NO_TIME}
    frame = {
        section: LEAST_SECTION if section.title in STRETCH else timed[section]
        for section in timed
        if clean(section.title) in FRAME
    }
    rest = [section for section in timed if section not in frame]
    left = minutes - breaks * pause - OPENING - sum(frame.values())
    practised, taught, free = _route(chapter, exercises, rest, timed, left, PRACTICE * minutes)
    for title in reversed(STRETCH):
        for section in frame:
            if section.title == title:
                more = min(free, STRETCH[title] - frame[section])
                frame[section] += more
                free -= more
    parts = [Part("opening", "Start, and run everything once", OPENING)]
    last = [Part("closing", s.title, frame[s], section=s) for s in frame if s.title == FRAME[-1]]
    for section in timed:
        if section in taught or (section in frame and section.title != FRAME[-1]):
            many = frame.get(section, timed[section])
            parts.append(Part("section", clean(section.title), many, section=section))
    parts += [Part("exercise", e.name, e.minutes, exercise=e) for e in practised]
    parts = _with_breaks(chapter, parts, breaks, pause) + last
    if free:
        parts.append(Part("questions", "Questions, or another exercise", free))
    return Plan(
        chapter,
        minutes,
        tuple(_timed(parts)),
        tuple(exercises),
        tuple((section, timed[section]) for section in rest if section not in taught),
        tuple(e for e in exercises if e not in practised),
    )


def clean(title: str) -> str:
    """A heading without the minutes it states."""
    return TIME.sub("", title).rstrip()


def _route(chapter, exercises, rest, timed, left, practice):
    """(exercises, sections, minutes that stay free) of the route that fits `left` minutes.

    Where no exercise fits with its sections, the shortest is taken without them.
    """
    practised, taught, worked = [], [], 0
    for exercise in exercises:
        wanted = rests_on(chapter, exercise, chapter.sections)
        more = [s for s in rest if s.title in wanted and s not in taught]
        cost = exercise.minutes + sum(timed[section] for section in more)
        if cost <= left and worked + exercise.minutes <= practice:
            practised.append(exercise)
            taught += more
            worked += exercise.minutes
            left -= cost
    if not practised:
        exercise = min(exercises, key=lambda e: (e.minutes, e.number))
        if exercise.minutes > left:
            raise BookError(
                f"the session is too short for {chapter.slug}: its idea, panel and closing leave"
                f" {max(0, left)} minutes, and its shortest exercise takes {exercise.minutes}"
            )
        practised, left = [exercise], left - exercise.minutes
    for section in rest:
        if section not in taught and timed[section] <= left:
            taught.append(section)
            left -= timed[section]
    return practised, taught, left


def _with_breaks(chapter: Chapter, parts: list[Part], breaks: int, pause: int) -> list[Part]:
    """The parts with breaks between them, nearest to equal shares.

    A section with an `instructor` cell that says `**Break.**` draws a break to its end.
    """
    whole = sum(part.minutes for part in parts)
    for number in range(1, breaks + 1):
        places, gone = [], 0
        for at, part in enumerate(parts[:-1], 1):
            gone += part.minutes if part.kind != "break" else 0
            free = part.kind != "break" and parts[at].kind != "break" and at > 1
            if free:
                wish = part.section is not None and _asks_break(chapter, part.section)
                places.append((abs(gone - whole * number / (breaks + 1)) - 15 * wish, at))
        if places:
            parts.insert(min(places)[1], Part("break", "Break", pause))
    return parts


def _asks_break(chapter: Chapter, section: Section) -> bool:
    return any(
        "instructor" in tags(cell) and "**Break.**" in cell.source
        for cell in chapter.cells[section.start : section.end]
    )


def _timed(parts: list[Part]) -> list[Part]:
    now, timed = 0, []
    for part in parts:
        timed.append(replace(part, begins=now))
        now += part.minutes
    return timed


def shares(minutes: int, many: int) -> tuple[int, int, int]:
    """(minutes, breaks, minutes of a break) of each of several chapters in a session.

    Raises BookError for other minutes than 45, 90 or 180, and for too many chapters.
    """
    if minutes not in LENGTHS:
        raise BookError(f"{minutes} minutes: a session takes 45, 90 or 180")
    each = minutes // many
    if each < LEAST:
        raise BookError(f"{minutes} minutes are too few for {many} chapters: {LEAST} each at least")
    breaks = BREAKS[minutes] if many == 1 else int(minutes == 180 and many == 2)
    return each, breaks, BREAK_MINUTES[minutes]
