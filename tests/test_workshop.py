"""Workshops: the route, both editions and the slides of a small chapter; every real chapter run.

The last part takes the student edition of each chapter out of its zip and runs it whole, in the
smoke profile: every self-check must refuse the empty answer with a sentence that helps, and accept
the solution pasted into the answer cell.
"""

import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib.book import chapter as chapters
from lib.book import (
    cli,
    engine,
    places,
    workshop,
    workshop_edition,
    workshop_exercises,
    workshop_plan,
    workshop_text,
)
from lib.errors import BookError

REPOSITORY = Path(__file__).resolve().parents[1]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
CLAIM = {"paper": "smith2024toy", "says": "More is more.", "paper_value": "2 (Table 1)"}


def exercise(name, minutes, answer, check, solution):
    """The four cells of an exercise."""
    return [
        new_markdown_cell(
            f"```{{exercise}} Number {name} (easy, {minutes} min)\n:label: toy-{name}\n\n"
            f"Add; {{cite}}`smith2024toy` did.\n```"
        ),
        new_code_cell(answer, metadata={"tags": ["exercise-answer"]}),
        new_code_cell(
            check,
            metadata={"tags": ["exercise-check"]},
            outputs=[new_output("stream", text="not yet: stored\n")],
        ),
        new_code_cell(
            solution,
            metadata={"tags": ["exercise-solution", "hide-cell"]},
            outputs=[new_output("stream", text="the secret is 42\n")],
        ),
    ]


def toy() -> nbformat.NotebookNode:
    """A complete small chapter that needs no model."""
    text, code = new_markdown_cell, new_code_cell
    figure = new_output(
        "display_data", data={"image/png": PNG}, metadata={"image/png": {"alt": "one <dot>"}}
    )
    said = new_output(
        "display_data",
        data={workshop_edition.CLAIM: CLAIM | {"ours": "1", "holds": False}, "text/plain": "row"},
    )
    cells = [
        text("# Toy\n\nYou will add.\n\n```{chapter-card}\n```"),
        text("## Parameters"),
        code("n: int = 4  # 1–10 prompts; how many", metadata={"tags": ["parameters"]}),
        text("```{parameters-table}\n```"),
        code("from lib import tool\n\nbase = tool.double(n)"),
        text("## The idea\n\nAdd $a_1 + b*c*$ up.\n\n$$\nx = \\frac{1}{2}\n$$ (eq-x)"),
        text("(paper-smith2024toy)=\n## A toy (12 min)\n\n{cite}`smith2024toy` asks, {doc}`toy`."),
        code("small = base + 1", outputs=[figure]),
        text("**Time: 3 minutes.** **Break.** Ask why.", metadata={"tags": ["instructor"]}),
        text("Look at it."),
        code("plot = 1", outputs=[said], metadata={"tags": ["hide-input"]}),
        text("## Long\n\n" + "word " * 3000),
        code("large = base + 2", outputs=[new_output("stream", text="long output\n")]),
        text("## Explore\n\nPlay."),
        text("## Exercises\n\nFill in the answers."),
    ]
    cells += exercise(
        "one",
        5,
        "one = ...",
        "def check_one(a):\n    return 'not yet: add n and 1' if a != n + 1 else 'correct'\n\n\n"
        "print(check_one(one))",
        "secret = n + 1\nprint(check_one(secret))",
    )
    cells += exercise(
        "two",
        10,
        "add = ...",
        "if add is ...:\n    print('not yet: write a function add(x)')\nelif add(2) != 3:\n"
        "    print(f'not yet: {add(2)} is not 3')\nelse:\n    print('correct: well done')",
        "def solved(x):\n    return x + small - base\n\n\nassert solved(2) == 3",
    )
    cells += exercise(
        "three",
        15,
        "three = ...",
        "print('not yet: take large' if three is ... or three != large else 'correct')",
        "def solved_three():\n    return large\n\n\nassert solved_three()",
    )
    cells += [text("## What held up\n\nAll."), text("## Further reading\n\nNone.")]
    notebook = new_notebook(cells=cells)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata["book"] = {"title": "Toy", "profiles": {"smoke": {"n": 2}, "full": {}}}
    return notebook


FILES = {
    "lib/__init__.py": "",
    "lib/tool.py": "import numpy\n\n\ndef double(x):\n    return 2 * x\n",
    "lib/book/cli.py": "",
    "data/papers.bib": "@misc{smith2024toy,\n title = {A Toy}, author = {Smith, A},\n"
    " year = {2024}, eprint = {2401.00001}, keywords = {patching}}\n",
    "data/toy/numbers.txt": "1 2 3\n",
    "data/other.txt": "none of it\n",
    "requirements.lock": "numpy==2.0\njupyterlab==4.0\nipykernel==7.0\nipywidgets==8.0\n"
    "pytest==9\n",
    "LICENSE": "MIT\n",
}


def book_with(folder: Path, notebook: nbformat.NotebookNode) -> Path:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "chapters").mkdir()
    path = folder / "chapters" / "toy.ipynb"
    path.write_text(places.notebook_text(notebook), encoding="utf-8")
    return folder


@pytest.fixture
def book(tmp_path):
    return book_with(tmp_path / "book", toy())


def planned(book, minutes=45):
    return workshop_plan.plan(chapters.read(book, "toy"), *workshop_plan.shares(minutes, 1))


def texts(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells)


# ---------------------------------------------------------------- the route


def test_minutes_are_those_stated_or_the_estimate(book):
    chapter = chapters.read(book, "toy")
    minutes = {s.title: workshop_plan.section_minutes(chapter, s) for s in chapter.sections}
    assert minutes["A toy (12 min)"] == 12  # the heading beats the instructor's cell
    assert minutes["Long"] == 42  # 3002 words at 75 a minute and one cell
    assert minutes["Explore"] == 5
    notebook = toy()
    notebook.cells[6].source = notebook.cells[6].source.replace(" (12 min)", "")
    chapter = chapters.Chapter(book, "toy", notebook, ())
    assert workshop_plan.section_minutes(chapter, chapter.section("A toy")) == 3


def test_the_route_fills_the_session_exactly_and_lists_what_it_leaves_out(book):
    plan = planned(book, 45)
    assert [part.kind for part in plan.parts] == [
        "opening", "section", "section", "section", "exercise", "closing"
    ]  # fmt: skip
    assert [part.title for part in plan.parts][1:4] == ["The idea", "A toy", "Explore"]
    assert [e.number for e in plan.homework] == [2, 3]
    assert [section.title for section, _ in plan.reading] == ["Long"]
    for minutes in workshop_plan.LENGTHS:
        plan = planned(book, minutes)
        assert sum(part.minutes for part in plan.parts) == minutes
        assert all(part.minutes > 0 for part in plan.parts)
        ends = [part.begins + part.minutes for part in plan.parts]
        assert [part.begins for part in plan.parts] == [0, *ends[:-1]]
        assert sum(part.kind == "break" for part in plan.parts) == workshop_plan.BREAKS[minutes]


def test_an_exercise_brings_the_sections_it_rests_on(book):
    chapter = chapters.read(book, "toy")
    one, two, three = workshop_exercises.find(chapter)
    rests = [workshop_exercises.rests_on(chapter, e, chapter.sections) for e in (one, two, three)]
    assert "A toy (12 min)" in rests[1] and "Long" not in rests[1]
    assert "Long" in rests[2]
    assert [e.number for e in planned(book, 180).exercises] == [1, 2, 3]
    assert not planned(book, 180).reading


def test_a_break_goes_where_an_instructor_asks_for_it(book):
    titles = [part.title for part in planned(book, 90).parts]
    assert titles[titles.index("A toy") + 1] == "Break"


def test_several_chapters_share_the_session():
    assert workshop_plan.shares(90, 2) == (45, 0, 5)
    assert workshop_plan.shares(180, 2) == (90, 1, 10)
    with pytest.raises(BookError, match="too few for 3 chapters"):
        workshop_plan.shares(90, 3)


# ---------------------------------------------------------------- the editions


def test_the_student_edition_has_no_solution_and_nothing_for_the_instructor(book):
    made = workshop_edition.student(planned(book))
    whole = places.notebook_text(made)
    for secret in ("secret", "solved(", "exercise-solution", "Ask why", "Common wrong"):
        assert secret not in whole, secret
    assert sum("exercise-check" in chapters.tags(cell) for cell in made.cells) == 3
    assert "### Exercise 2: Number two\n\n*easy · 10 minutes*" in texts(made)
    nbformat.validate(made)


def test_an_edition_is_plain_markdown_with_plain_links(book):
    plan = planned(book)
    for made in (workshop_edition.student(plan), workshop_edition.instructor(plan)):
        text = texts(made)
        assert not re.search(r"\{[a-z][\w:-]+\}[`\s]|^\(\S+\)=|^:label:", text, re.M)
        assert "[Smith 2024](https://arxiv.org/abs/2401.00001) asks, *Toy*." in text
        assert "$$\nx = \\frac{1}{2}\n$$\n" in text + "\n" and "(eq-x)" not in text


def test_only_sections_for_reading_keep_their_outputs_and_are_folded(book):
    made = workshop_edition.student(planned(book))
    kept = [cell.source for cell in made.cells if cell.get("outputs")]
    assert kept == ["large = base + 2"]
    folded = [cell for cell in made.cells if "jp-MarkdownHeadingCollapsed" in cell.metadata]
    assert [cell.source.splitlines()[0] for cell in folded] == ["## Long"]
    assert "For reading after the session" in folded[0].source


def test_the_instructor_edition_has_solutions_plan_wrong_answers_and_questions(book):
    text = texts(workshop_edition.instructor(planned(book)))
    for part in (
        "Ask why.", "> **0:10–0:22** · 12 minutes · A toy", "> - write a function add(x)",
        "> - … is not 3",
        "secret = n + 1\none = secret", "add = solved", "three = solved_three()",
        "“More is more.” The paper has 2 (Table 1), this run 1: not held",
    ):  # fmt: skip
        assert part in text, part


def test_the_instructor_edition_says_when_the_break_is(book):
    text = texts(workshop_edition.instructor(planned(book, 90)))
    assert "> **0:22–0:27** · 5 minutes · Break\n>\n> **0:27–" in text


def test_a_directive_or_role_inside_code_stays():
    source = "See `{cite}` and\n\n````md\n```{exercise} X\n```\n$a$\n````\n\n`a_$b$` $c$"
    words = type("None", (), {"role": staticmethod(lambda match: "role")})
    assert workshop_text.plain(source, words) == source
    made = workshop_text.with_mathml(source)
    assert "`a_$b$` <math" in made and "\n$a$\n" in made


# ---------------------------------------------------------------- slides


def test_slides_fetch_nothing_and_carry_words_for_figures(book, tmp_path):
    workshop.make(book, ["toy"], 45, tmp_path / "out")
    folder = tmp_path / "out" / "instructor"
    page = (folder / "toy.slides.html").read_text(encoding="utf-8")
    for address in re.findall(r"<(?:script|link|img|iframe)[^>]+?(?:src|href)=\"([^\"]+)", page):
        assert address.startswith("data:") or (folder / address).is_file(), address
    assert 'alt="one &lt;dot&gt;"' in page
    assert page.count("<math") == 2 and "MathJax" not in page
    assert '<aside class="notes">' in page and "Ask why" in page
    assert "solved" not in page and "Number one" in page and "Number two" not in page
    size = sum(path.stat().st_size for path in (folder / "reveal.js").rglob("*.*"))
    assert size < 300_000 and (folder / "reveal.js" / "LICENSE").is_file()


def test_slides_open_in_a_browser_and_turn(book, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium with chromedriver here: the slides are not opened in a browser")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    workshop.make(book, ["toy"], 45, tmp_path / "out")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("--headless=new", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    running = webdriver.Chrome(options=options, service=Service(driver))
    try:
        running.get((tmp_path / "out/instructor/toy.slides.html").as_uri())
        titles = [running.execute_script(TURN) for _ in range(9)]
        assert [title for title in titles if title] == [
            "Toy", "This session", "Start, and run everything once", "The idea", "A toy",
            "Explore", "Exercise 1: Number one", "What held up",
        ]  # fmt: skip
        assert running.execute_script("return Reveal.isLastSlide()")
        assert running.get_log("browser") == []
    finally:
        running.quit()


TURN = """
const title = Reveal.getCurrentSlide().querySelector("h1, h2");
Reveal.next();
return title && title.innerText;
"""


# ---------------------------------------------------------------- the folder


def test_a_workshop_is_complete_and_the_same_every_time(book, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BOOK_ROOT", str(book))
    out, again = tmp_path / "out", tmp_path / "again"
    assert cli.main(["workshop", "toy", "--minutes", "45", "--out", str(out)]) == 0
    assert "1 of 3 exercises, 1 sections left for reading" in capsys.readouterr().out
    assert sorted(zipfile.ZipFile(out / "student.zip").namelist()) == [
        f"student/{name}"
        for name in (
            "LICENSE", "README.md", "data/papers.bib", "data/toy/numbers.txt", "lib/__init__.py",
            "lib/tool.py", "requirements.txt", "toy.ipynb",
        )
    ]  # fmt: skip
    lines = (out / "student" / "requirements.txt").read_text().split()
    assert lines == ["ipykernel==7.0", "ipywidgets==8.0", "jupyterlab==4.0", "numpy==2.0"]
    readme = (out / "student" / "README.md").read_text()
    assert "pip install -r requirements.txt" in readme and "make" not in readme
    workshop.make(book, ["toy"], 45, again)
    assert (out / "student.zip").read_bytes() == (again / "student.zip").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toi"], "no chapter 'toi'; did you mean toy?"),
        (["toy", "--minutes", "60"], "60 minutes: a session takes 45, 90 or 180"),
        (["toy", "--minutes", "soon"], "invalid int value"),
        (["toy", "toy"], "named twice"),
        (["toy", "--out", "full"], "is not empty"),
        (["toy", "--out", "full/file"], "is a file"),
        (["toy", "--out", "full/file/below"], "cannot write"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    book, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setenv("BOOK_ROOT", str(book))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "new"]
    assert cli.main(["workshop", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("book: ") and said.count("\n") == 1 and message in said
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(easy, 10 min)", "", "states no time"),
        ("def solved(x):", "def solved_three(x):", None),
        ("print(check_one(secret))", "print('correct')", "does not say what one is"),
        ("one = ...", "one = 3", "no `name = ...`"),
        ("$a_1", "$a_{1", "equation"),
    ],
)
def test_a_chapter_that_is_not_complete_is_refused(tmp_path, old, new, message):
    notebook = toy()
    for cell in notebook.cells:
        cell.source = cell.source.replace(old, new)
    book = book_with(tmp_path / "book", notebook)
    if message is None:
        workshop.make(book, ["toy"], 45, tmp_path / "out")
        return
    with pytest.raises(BookError, match=re.escape(message)) as error:
        workshop.make(book, ["toy"], 45, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- every chapter, run


def practised(slug: str, book: Path, folder: Path) -> dict[str, list[str]]:
    """Run a student edition from its zip: name of each exercise → what its check says, empty and
    solved."""
    workshop.make(book, [slug], 180, folder / "out")
    with zipfile.ZipFile(folder / "out" / "student.zip") as archive:
        archive.extractall(folder)
    home = folder / "student"
    notebook = places.read_notebook(home / f"{slug}.ipynb")
    chapter = chapters.read(book, slug)
    found = workshop_exercises.find(chapter)
    ids = {cell.id: exercise for exercise in found for cell in [chapter.cells[exercise.check]]}
    values = chapter.facts.get("profiles", {}).get("smoke", {})
    given = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    where = "from pathlib import Path\n\nimport lib\n\nprint(Path(lib.__file__).parents[1])"
    cells = [new_code_cell(where, id="where")]
    for cell in notebook.cells:
        cells.append(cell)
        if "parameters" in chapters.tags(cell):
            cells.append(new_code_cell(given))
        if cell.id in ids:  # a student has seen "not yet", fills in the answer, checks again
            cells.append(new_code_cell(workshop_exercises.pasted(chapter, ids[cell.id])))
            cells.append(new_code_cell(cell.source, id=f"{cell.id[:50]}-solved"))
    notebook.cells = cells
    done = run(notebook, home)
    said = {cell.id: shown(cell) for cell in done.cells if cell.cell_type == "code"}
    assert Path(said["where"]) == home.resolve()  # the zip's own library ran, not this one
    return {one.name: [said[key], said[f"{key[:50]}-solved"]] for key, one in ids.items()}


def run(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Every cell in a fresh kernel in `folder`; a cell that fails is an error that names it."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    sockets = tempfile.TemporaryDirectory(prefix="book-", ignore_cleanup_errors=True)
    client = NotebookClient(
        notebook,
        kernel_manager_class=type("Kernel", (engine._Kernel,), {"folder": sockets.name}),
        timeout=300,
        startup_timeout=120,
        resources={"metadata": {"path": str(folder)}},
    )
    environment = engine.kernel_environment(folder)
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        raise AssertionError(
            f"{folder.parent.name}: {error.ename}: {error.evalue}\n{error}"
        ) from None
    return notebook


def shown(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream").strip()


def judged(said: dict[str, list[str]]) -> list[str]:
    """What is wrong with what the checks said."""
    wrong = []
    for name, (empty, solved) in said.items():
        if not re.match(r"not yet: \S+(\s+\S+){2}", empty):
            wrong.append(f"{name}: the empty answer gets {empty!r}")
        if not solved.startswith("correct"):
            wrong.append(f"{name}: the solution gets {solved!r}")
    return wrong


def test_a_check_that_accepts_everything_or_nothing_is_found(tmp_path):
    notebook = toy()
    checks = [cell for cell in notebook.cells if "exercise-check" in chapters.tags(cell)]
    checks[0].source = "def check_one(a):\n    return 'correct'\n\n\nprint(check_one(one))"
    checks[2].source = "print('not yet: take large, which is base + 2')"
    said = practised("toy", book_with(tmp_path / "book", notebook), tmp_path)
    assert judged(said) == [
        "Exercise 1, Number one: the empty answer gets 'correct'",
        "Exercise 3, Number three: the solution gets 'not yet: take large, which is base + 2'",
    ]


@pytest.mark.parametrize("slug", places.slugs(REPOSITORY))
def test_every_student_edition_runs_and_its_checks_tell_empty_from_solved(slug, tmp_path):
    assert judged(practised(slug, REPOSITORY, tmp_path)) == []
