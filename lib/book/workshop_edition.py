"""The student and the instructor edition of a chapter, made from its one notebook.

Both keep the code of every section in the chapter's order, because later cells rest on earlier
ones; sections that are not in the session's route are folded and marked as reading. A cell for
the instructor alone is markdown tagged `instructor` (and `remove-cell`, which hides it in the
book's pages).
"""

import copy

import nbformat
from nbformat.v4 import new_markdown_cell

from lib.book import store
from lib.book.chapter import Chapter, Section, tags
from lib.book.workshop_exercises import NOT_YET, hints, pasted
from lib.book.workshop_plan import Part, Plan, clean
from lib.book.workshop_text import Words, plain

CLAIM = "application/vnd.book.claim+json"
FOLDED = {"jp-MarkdownHeadingCollapsed": True}


def student(plan: Plan) -> nbformat.NotebookNode:
    """The edition to hand out: no solution, nothing for the instructor, nothing run yet.

    Sections for reading keep their outputs, so that they can be read without being run.
    """
    return _edition(plan, teach=False)


def instructor(plan: Plan) -> nbformat.NotebookNode:
    """The edition to teach from: outputs, solutions, the plan, breaks, wrong answers, questions."""
    return _edition(plan, teach=True)


def _edition(plan: Plan, teach: bool) -> nbformat.NotebookNode:
    chapter, words = plan.chapter, Words(plan.chapter)
    starts = {section.start: section for section in chapter.sections}
    exercises: dict[int, list] = {}
    for one in plan.exercises:
        exercises.setdefault(one.start, []).append(one)
    checks = {one.check: one for one in plan.exercises}
    solutions = {one.solution: one for one in plan.exercises}
    read = {section for section, _ in plan.reading}
    cells, section = [], None
    for index, cell in enumerate(chapter.cells):
        section = starts.get(index, section)
        if "instructor" in tags(cell):
            if teach:
                cells.append(_markdown(f"> **For you.**\n>\n{_quoted(plain(cell.source, words))}"))
            continue
        if index in solutions and not teach:
            continue
        if cell.cell_type == "markdown":
            text = plain(cell.source, words, exercises.get(index, []))
            if index in starts and section in read:
                cells.append(_heading(text, plan, section))
            elif text:
                if teach and index in starts and plan.part_of(section):
                    cells.append(_markdown(_clock(plan, plan.part_of(section))))
                cells.append(_markdown(text, cell))
                cells += _exercise_notes(plan, exercises.get(index, []), teach)
            if index == 0:
                cells.append(_markdown(session(plan, teach)))
        elif cell.cell_type == "code":
            clear = not teach and (section not in read or index in checks)
            cells.append(_code(cell, clear))
            if teach and index in solutions:
                cells.append(_markdown(_solution_note(plan, solutions[index])))
        else:
            cells.append(_copied(cell))
    if teach:
        cells.append(_markdown(discussion(chapter)))
    own = {cell.get("id") for cell in chapter.cells}
    for number, cell in enumerate(cells):  # the same bytes every time
        if cell.id not in own:
            cell.id = f"workshop-{number}"
    made = nbformat.v4.new_notebook(cells=cells)
    made.metadata["kernelspec"] = dict(store.KERNEL)
    made.metadata["language_info"] = dict(store.LANGUAGE)
    made.metadata["title"] = title(chapter)
    made.metadata["workshop"] = {
        "chapter": chapter.slug,
        "minutes": plan.minutes,
        "edition": "instructor" if teach else "student",
    }
    return made


def title(chapter: Chapter) -> str:
    """The chapter's title."""
    return chapter.facts.get("title") or chapter.slug


def _markdown(text: str, like: nbformat.NotebookNode | None = None) -> nbformat.NotebookNode:
    cell = new_markdown_cell(text)
    if like is not None and "id" in like:
        cell.id = like.id
    return cell


def _copied(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    made = copy.deepcopy(cell)
    for name in store.TRANSIENT:
        made.metadata.pop(name, None)
    return made


def _code(cell: nbformat.NotebookNode, clear: bool) -> nbformat.NotebookNode:
    made = _copied(cell)
    folded = {"hide-input", "hide-cell"} & set(tags(cell))
    if folded:
        made.metadata.setdefault("jupyter", {})["source_hidden"] = True
    if clear:
        made.outputs, made.execution_count = [], None
    return made


def _heading(text: str, plan: Plan, section: Section) -> nbformat.NotebookNode:
    """The heading of a section for reading: folded, with a note under it."""
    lines = text.split("\n")
    minutes = dict(plan.reading)[section]
    note = f"*For reading after the session (about {minutes} minutes). Run its cells all the same.*"
    at = next((i + 1 for i, line in enumerate(lines) if line.startswith("##")), 0)
    cell = _markdown("\n".join([*lines[:at], "", note, *lines[at:]]))
    cell.metadata |= FOLDED
    return cell


def _clock(plan: Plan, part: Part) -> str:
    """When a part begins, after the break before it."""
    at = plan.parts.index(part)
    pause = plan.parts[at - 1 : at] if at and plan.parts[at - 1].kind == "break" else ()
    lines = [f"> **{one.clock}** · {one.minutes} minutes · {one.title}" for one in (*pause, part)]
    return "\n>\n".join(lines)


def _exercise_notes(plan: Plan, exercises: list, teach: bool) -> list[nbformat.NotebookNode]:
    """Where an exercise stands in the session, and for the instructor what goes wrong."""
    cells = []
    for one in exercises:
        if one in plan.homework:
            cells.append(_markdown(f"*{one.name}: for later, not in this session.*"))
        if teach:
            part = next((p for p in plan.parts if p.exercise == one), None)
            clock = [_clock(plan, part), ">"] if part else []
            wrong = [f"> - {text}" for text in hints(plan.chapter, one)]
            note = ["> **Common wrong answers**, by what the self-check says to them:", ">", *wrong]
            cells.append(_markdown("\n".join(clock + note)))
    return cells


def _solution_note(plan: Plan, exercise) -> str:
    source = pasted(plan.chapter, exercise)
    return (
        f"> **{exercise.name}** is solved by this in the answer cell:\n\n```python\n{source}\n```"
    )


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def session(plan: Plan, teach: bool) -> str:
    """The session as a table, what is left for reading, and how to begin."""
    rows = [f"| {part.clock} | {part.title} | {part.minutes} |" for part in plan.parts]
    lines = [f"**This session** takes {plan.minutes} minutes.", ""]
    lines += ["| time | part | minutes |", "| --- | --- | ---: |", *rows, ""]
    if plan.reading:
        lines += ["Left for reading (folded below, at their places):", ""]
        lines += [f"- {clean(s.title)}, about {minutes} minutes" for s, minutes in plan.reading]
        lines.append("")
    if plan.homework:
        names = [f"- {one.name} ({one.difficulty}, {one.minutes} min)" for one in plan.homework]
        lines += ["Exercises for later:", "", *names, ""]
    if teach:
        seconds = plan.chapter.facts.get("measured", {}).get("default", {}).get("seconds")
        took = f" That took {seconds:.0f} s on two cores." if seconds else ""
        lines.append(
            f"Before you teach, run all cells once (*Run → Run All Cells*).{took} The solutions and"
            " the notes marked **For you** are in this edition only."
        )
    else:
        lines.append(
            "Begin with *Run → Run All Cells*: the model loads and everything below is there to"
            " look at, change and run again. The self-check of an unsolved exercise says"
            f" “{NOT_YET}”; fill in the `...` above it, run that cell, then the check again."
        )
    return "\n".join(lines)


def discussion(chapter: Chapter) -> str:
    """Questions on the claims, those that did not hold first."""
    claims = [
        output.data[CLAIM]
        for _, cell in chapter.code()
        for output in cell.outputs
        if CLAIM in output.get("data", {})
    ]
    failed = [claim for claim in claims if not claim.get("holds")]
    held = [claim for claim in claims if claim.get("holds")]
    lines = ["> **To discuss.**", ">"]
    for claim in failed:
        lines.append(
            f"> - “{claim['says']}” The paper has {claim['paper_value']}, this run"
            f" {claim['ours']}: not held. Is it the size, the data or the claim? What would you"
            " run to tell?"
        )
    if held:
        lines.append(
            f"> - {len(held)} claims held. Choose one: which baseline makes it mean something, and"
            " which change of a parameter would you expect to break it? Try it."
        )
    lines.append(
        "> - Which number of this chapter would you want from more seeds, texts or models before"
        " you build on it?"
    )
    return "\n".join(lines)
