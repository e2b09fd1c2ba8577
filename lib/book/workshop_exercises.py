"""The exercises of a chapter: their titles and minutes, their cells, what they rest on.

The solution of an exercise runs under a name of its own. `pasted` finds what it puts in the place
of the answer, so that it can be pasted into the answer cell as a student would write it there.
"""

import ast
import re
from dataclasses import dataclass

from lib.book.chapter import Chapter, Section, called, tags
from lib.book.check_parts import EXERCISE
from lib.errors import BookError

SIZE = re.compile(r"^(.*?)\s*\((easy|medium|hard), (\d+) min\)\s*$")
STEPS = ("exercise-answer", "exercise-check", "exercise-solution")
NOT_YET = "not yet"


@dataclass(frozen=True)
class Exercise:
    """An exercise; `start` is the index of its text, the others of its code cells."""

    number: int
    title: str
    difficulty: str
    minutes: int
    start: int
    answer: int
    check: int
    solution: int

    @property
    def name(self) -> str:
        """`Exercise 2, The lens as an edit`."""
        return f"Exercise {self.number}, {self.title}"


def find(chapter: Chapter) -> list[Exercise]:
    """The exercises in order, numbered from 1. Raises BookError where one is incomplete."""
    starts = [
        (index, match[1].strip())
        for index, cell in enumerate(chapter.cells)
        if cell.cell_type == "markdown"
        for match in EXERCISE.finditer(cell.source)
    ]
    found = []
    for number, (index, heading) in enumerate(starts, 1):
        where = f"chapters/{chapter.slug}.ipynb: exercise {heading!r}"
        size = SIZE.match(heading)
        if not size:
            raise BookError(f"{where} states no time: end its title `(medium, 10 min)`")
        end = starts[number][0] if number < len(starts) else len(chapter.cells)
        steps = {}
        for at in range(index + 1, end):
            for step in set(tags(chapter.cells[at])) & set(STEPS):
                steps.setdefault(step, at)
        missing = [step for step in STEPS if step not in steps]
        if missing:
            raise BookError(f"{where} has no cell tagged {' or '.join(missing)}")
        cells = (steps[step] for step in STEPS)
        found.append(Exercise(number, size[1], size[2], int(size[3]), index, *cells))
    return found


# ---------------------------------------------------------------- pasting a solution


def pasted(chapter: Chapter, exercise: Exercise) -> str:
    """The answer cell's source with the solution in it.

    What the solution gives to the self-check's function becomes the answer. Where the check is no
    function, the solution is one: it is the answer where the check calls the answer, and returns
    it where not. Raises BookError where neither holds.
    """
    trees = [_tree(chapter, at) for at in (exercise.answer, exercise.check, exercise.solution)]
    answer, check, solution = trees
    names = blanks(answer)
    where = f"chapters/{chapter.slug}.ipynb: {exercise.name}"
    if not names:
        raise BookError(f"{where}: the answer cell has no `name = ...` to fill")
    given = {}
    for name in names:
        value = _value(name, check, solution)
        if value is None:
            raise BookError(
                f"{where}: the solution does not say what {name} is: call the self-check's function"
                " with it, or write a function that returns it"
            )
        given[name] = value
    kept = _lines(chapter, exercise.answer, [n for n in answer.body if not _fills(n, names)])
    made = [node for node in solution.body if not isinstance(node, ast.Expr | ast.Assert)]
    kept += _lines(chapter, exercise.solution, [n for n in made if not _fills(n, names)])
    return "\n".join([*kept, *(f"{name} = {value}" for name, value in given.items())])


def _lines(chapter: Chapter, index: int, nodes: list[ast.stmt]) -> list[str]:
    """The lines of some statements of a cell, comments beside them included."""
    lines = chapter.cells[index].source.splitlines()
    found = []
    for node in nodes:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found += lines[first - 1 : node.end_lineno]
    return found


def blanks(tree: ast.Module) -> list[str]:
    """Names that an answer cell sets to `...`."""
    return [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and _is_blank(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]


def _is_blank(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def _fills(node: ast.AST, names: list[str]) -> bool:
    return isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id in names for target in node.targets
    )


def _tree(chapter: Chapter, index: int) -> ast.Module:
    if index not in chapter.trees:
        raise BookError(f"chapters/{chapter.slug}.ipynb: cell {index + 1} is not valid Python")
    return ast.parse(chapter.cells[index].source)


def _value(name: str, check: ast.Module, solution: ast.Module) -> str | None:
    """The source of what a solution puts for `name`, or None."""
    for node in solution.body:
        if _fills(node, [name]):
            return ast.unparse(node.value)
    for call in (node for node in ast.walk(check) if isinstance(node, ast.Call)):
        for place, argument in enumerate(call.args):
            if isinstance(argument, ast.Name) and argument.id == name and called(call):
                for other in ast.walk(solution):
                    if called(other) == called(call) and len(other.args) > place:
                        return ast.unparse(other.args[place])
    made = [node for node in solution.body if isinstance(node, ast.FunctionDef)]
    if not made:
        return None
    if any(called(node) == name for node in ast.walk(check)):
        return made[-1].name
    return None if made[-1].args.args else f"{made[-1].name}()"


# ---------------------------------------------------------------- what an exercise rests on


def rests_on(chapter: Chapter, exercise: Exercise, sections: list[Section]) -> set[str]:
    """Titles of the sections that first bind a name which the exercise's cells read.

    An estimate for planning: an edition keeps the code of every section, whoever needs it.
    """
    first: dict[str, str] = {}
    for section in sections:
        for index, _ in chapter.code(section):
            if index in chapter.trees and index < exercise.start:
                for name in bound(chapter.trees[index]):
                    first.setdefault(name, section.title)
    cells = [
        chapter.trees[at]
        for at in (exercise.answer, exercise.check, exercise.solution)
        if at in chapter.trees
    ]
    own = {name for tree in cells for name in everything_bound(tree)}
    read = {
        node.id
        for tree in cells
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    return {first[name] for name in read - own if name in first}


def bound(tree: ast.AST) -> set[str]:
    """Names that a cell binds for the cells after it."""
    names: set[str] = set()
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    inner += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(each.asname or each.name).partition(".")[0] for each in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if not isinstance(node, inner):
            names |= bound(node)
    return names


def everything_bound(tree: ast.AST) -> set[str]:
    """Names bound anywhere in a cell, arguments and names inside functions included."""
    names = bound(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def hints(chapter: Chapter, exercise: Exercise) -> list[str]:
    """What the self-check says to wrong answers, without `not yet: `; values shown as `…`."""
    tree = _tree(chapter, exercise.check)
    inside = {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
            found.append((node.lineno, node.col_offset, "".join(parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in inside:
                found.append((node.lineno, node.col_offset, node.value))
    said = [text.removeprefix(NOT_YET).lstrip(": ") for *_, text in sorted(found) if _no(text)]
    return [text for text in dict.fromkeys(said) if text.strip("… ")]


def _no(text: str) -> bool:
    return text.startswith(NOT_YET)
