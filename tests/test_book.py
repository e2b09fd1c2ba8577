"""The `book` command, on a throw-away book in a temporary folder."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib.book import check, check_code, cli, nbval_claims, params, places, record, runs, stale
from lib.errors import BookError

REPOSITORY = Path(__file__).resolve().parents[1]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="

LIBRARY = {
    "__init__.py": "",
    "claims.py": """
from IPython.display import display

made = []


def claim(paper, says, paper_value, ours, holds):
    made.append(dict(paper=paper, says=says, paper_value=paper_value, ours=ours, holds=holds))
    display({"application/vnd.book.claim+json": made[-1], "text/plain": says}, raw=True)


def held_up():
    display({"application/vnd.book.claims+json": made, "text/plain": "table"}, raw=True)
""",
    "tool.py": '"""Doubles."""\n\n\ndef double(x):\n    from lib.rooms import deep\n\n'
    "    return deep.twice(x)  # a comment\n",
    "rooms/__init__.py": "",
    "rooms/deep.py": "def twice(x):\n    return 2 * x\n",
    "rooms/beside.py": "x = 1\n",
    "alone.py": "nobody = 'imports this'\n",
}
FILES = {
    "_toc.yml": "format: jb-book\nroot: chapters/intro  # first\nparts:\n  - caption: All\n"
    "    chapters:\n      - file: chapters/toy  # a toy\n      - file: chapters/scoreboard\n",
    "requirements.lock": "numpy==2\n",
    "data/papers.bib": "@misc{smith2024toy,\n  title = {A Toy: It Works},\n  author = {Smith, A},\n"
    "  year = {2024},\n  keywords = {toy},\n}\n\n@misc{jones2023other,\n  title = {Other},\n"
    "  author = {Jones, B},\n  year = {2023},\n  keywords = {patching},\n}\n",
    "data/toy/numbers.txt": "1 2 3\n",
    "data/named.txt": "4\n",
    "data/unnamed.txt": "5\n",
    "data/archive.npz": "6\n",
    "data/else/named.bin": "6\n",
    "data/else/named.txt": "7\n",
}
PARAMETERS = """\
n: int = 4  # 1–10 prompts; how many
mode: str = "fine"  # fine | slow | fail | die | sleep; what the run does
rate: float = 0.5  # 0.1–2 Hz; a speed
flag: bool = True  # any; a switch"""
BEHAVE = """\
import os
import time
from pathlib import Path

from lib import claims, tool

number = Path("../data/named.txt").read_text()
archive = "archive"
if mode == "fail":
    raise ValueError("too much\\nof it")
if mode == "die":
    os._exit(3)
if mode == "sleep":
    Path("../asleep").touch()
    time.sleep(60)
where = Path.cwd().name, os.environ["HF_HUB_OFFLINE"], os.environ["PYTHONHASHSEED"]
print(*where, n, mode, rate, flag, tool.double(n))"""
FIGURE = f"""\
from IPython.display import display

display({{"image/png": "{PNG}"}}, raw=True, metadata={{"image/png": {{"alt": "one dot"}}}})
view = {{"version_major": 2, "version_minor": 0, "model_id": os.urandom(8).hex()}}
widget = "application/vnd.jupyter.widget-view+json"
display({{widget: view, "text/plain": "a slider"}}, raw=True)
display({{widget: view, "text/html": "<b>panel</b>"}}, raw=True)
print("one", flush=True)
time.sleep(0.05)
print("two", flush=True)
n"""
CLAIM = 'claims.claim("smith2024toy", "more is more", "2.0 (Table 1)", f"{2 * n:.1f}", n > 3)'


def toy() -> nbformat.NotebookNode:
    """A complete small chapter that needs no model."""
    text, code = new_markdown_cell, new_code_cell
    cells = [
        text(
            "# Toy\n\nYou will see that a chapter with all its parts runs and passes its checks."
            "\n\n```{chapter-card}\n```"
        ),
        text("## Parameters"),
        code(PARAMETERS, metadata={"tags": ["parameters"]}),
        text("```{parameters-table}\n```"),
        code(BEHAVE),
        text("## The idea\n\n```\n# no heading\n```"),
        text("(paper-smith2024toy)=\n## A toy\n\n{cite}`smith2024toy` asks whether it works."),
        code(FIGURE),
        code(CLAIM, metadata={"tags": ["nbval-check-output"]}),
        text("## Explore"),
        text("## Exercises"),
    ]
    for name in ("one", "two", "three"):
        cells += [
            text(f"```{{exercise}} Number {name} (easy, 5 min)\n:label: toy-{name}\n\nAdd.\n```"),
            code(f"{name} = ...", metadata={"tags": ["exercise-answer"]}),
            code(f"print('not yet' if {name} is ... else 'correct')",
                 metadata={"tags": ["exercise-check"]}),
            code("print('correct')", metadata={"tags": ["exercise-solution", "hide-cell"]}),
        ]  # fmt: skip
    cells += [
        text("## What held up\n\n" + "All of it, because a toy is made to. " * 5),
        code("claims.held_up()", metadata={"tags": ["nbval-check-output"]}),
        text("## Further reading\n\nNone."),
    ]
    notebook = new_notebook(cells=cells)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata["book"] = {
        "title": "Toy", "summary": "A toy.", "models": [], "data": [], "prerequisites": [],
        "profiles": {"smoke": {"n": 2}, "full": {"n": 10, "rate": 2}},
    }  # fmt: skip
    return notebook


def make(folder: Path) -> Path:
    """The toy book in `folder`."""
    for name, text in (FILES | {f"lib/{name}": text for name, text in LIBRARY.items()}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "chapters").mkdir()
    (folder / "chapters" / "toy.ipynb").write_text(places.notebook_text(toy()), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """A book whose chapter was run and stored once, for tests that only copy or read it."""
    book = make(tmp_path_factory.mktemp("book"))
    runs.run("toy", store=True, book=book, quiet=True)
    return book


@pytest.fixture
def book(ran, tmp_path, monkeypatch):
    """A copy of the stored book, and `BOOK_ROOT` at it."""
    folder = tmp_path / "book"
    shutil.copytree(ran, folder)
    monkeypatch.setenv("BOOK_ROOT", str(folder))
    return folder


def chapter(book: Path) -> nbformat.NotebookNode:
    return places.read_notebook(book / "chapters" / "toy.ipynb")


def save(book: Path, notebook: nbformat.NotebookNode, slug: str = "toy") -> None:
    (book / "chapters" / f"{slug}.ipynb").write_text(places.notebook_text(notebook), "utf-8")


def command(book: Path, *arguments: str, **settings) -> subprocess.Popen:
    """The command as a process of its own."""
    search = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    # A shell's background job ignores Ctrl-C, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, "-m", "lib.book.cli", *arguments],
        env={**os.environ, "BOOK_ROOT": str(book), "PYTHONPATH": search}, cwd=REPOSITORY,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings,
    )  # fmt: skip


def records(book: Path) -> list[dict]:
    return [record.read(path.parent) for path in sorted((book / "runs").glob("*/*/run.json"))]


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, expected",
    [
        ("n: int = 32  # 4–512 prompts; how many", ("int", 32, 4, 512, (), "prompts", "how many")),
        ("n: int = -3  # -5-5; signed", ("int", -3, -5, 5, (), "", "signed")),
        ("n: int = −3 if 0 else 1", None),
        ("r: float = 1  # 1e-4–1_000 Hz; rate", ("float", 1.0, 1e-4, 1000, (), "Hz", "rate")),
        ("r: float = 0.5  # 0–1 %", ("float", 0.5, 0, 1, (), "%", "")),
        ("m: str = 'a b'  # 'a b' | c; mode", ("str", "a b", None, None, ("a b", "c"), "", "mode")),
        ("k: int = 8  # 4 | 8 heads; k", ("int", 8, None, None, (4, 8), "heads", "k")),
        ("t: str = 'x;#y'  # any text; said", ("str", "x;#y", None, None, (), "text", "said")),
        ("b: bool = False  # any; on", ("bool", False, None, None, (), "", "on")),
    ],
)
def test_a_parameter_line_is_read_whole(line, expected):
    if expected is None:
        with pytest.raises(BookError):
            params.parse_source(line)
        return
    (parameter,) = params.parse_source(line).values()
    found = [
        getattr(parameter, name)
        for name in ("type", "default", "low", "high", "choices", "unit", "description")
    ]
    assert tuple(found) == expected
    assert type(parameter.default).__name__ == parameter.type


@pytest.mark.parametrize(
    "line, message",
    [
        ("n = 3  # 1–4", "line 1: 'n = 3' is not of the form"),
        ("n: int = 3", "n has no range"),
        ("n: int = 3  # how many", "begins with no range"),
        ("n: int = 30  # 4–8 prompts; x", "its default: parameter n: 30 is outside 4–8 prompts"),
        ("n: int = 3  # 8–4; x", "upside down"),
        ("n: int = 3.0  # 1–4; x", "parameter n is int, not float"),
        ("n: int = True  # 0–4; x", "parameter n is int, not bool"),
        ("n: list = []  # any; x", "type list is not one of int, float, bool, str"),
        ("n: int = len('abc')  # any; x", "is not a literal"),
        ("s: str = 'a'  # 1–4; x", "begins with no range"),
        ("n: int = 1  # any; x\nn: int = 2  # any; y", "line 2: n is defined twice"),
        ("n: int = (", "not valid Python"),
    ],
)
def test_a_bad_parameter_line_says_what_is_wrong(line, message):
    with pytest.raises(BookError, match=re.escape(message)):
        params.parse_source(line, "chapters/x.ipynb")


def test_typed_values_beat_the_profile_which_beats_the_default():
    known = params.parse_source(PARAMETERS)
    profiles = {"smoke": {"n": 2, "rate": 1}}
    values = params.chosen_values(known, profiles, "smoke", ["rate=0.25", "flag=FALSE"])
    assert values == {"n": 2, "mode": "fine", "rate": 0.25, "flag": False}
    with pytest.raises(BookError, match="profile smoke: no parameter 'm'"):
        params.chosen_values(known, {"smoke": {"m": 1}}, "smoke", [])
    with pytest.raises(BookError, match="'11' is outside|11 is outside"):
        params.chosen_values(known, {"smoke": {"n": 11}}, "smoke", [])


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "toi"], "no chapter 'toi'; did you mean toy?"),
        (["run", "../toy"], "no chapter '../toy'"),
        (["run", "toy", "-p", "nn=3"], "no parameter 'nn'; did you mean n?"),
        (["run", "toy", "-p", "n"], "-p n: write -p name=value"),
        (["run", "toy", "-p", "n=3", "-p", "n=4"], "-p n is given twice"),
        (["run", "toy", "-p", "n=three"], "parameter n must be of type int, not 'three'"),
        (["run", "toy", "-p", "n=2.5"], "parameter n must be of type int, not '2.5'"),
        (["run", "toy", "-p", "n=11"], "parameter n: 11 is outside 1–10 prompts"),
        (["run", "toy", "-p", "rate=nan"], "not a finite number"),
        (["run", "toy", "-p", "flag=maybe"], "parameter flag must be true or false, not 'maybe'"),
        (["run", "toy", "-p", "mode=fast"], "'fast' is outside fine | slow | fail"),
        (
            ["run", "toy", "--profile", "smok"],
            "no profile 'smok' in this chapter; did you mean smoke",
        ),
        (["run", "toy", "--store", "-p", "n=3"], "--store and --measure take no -p"),
        (["run", "toy", "--store", "--profile", "smoke"], "--store keeps the default profile's"),
        (["run"], "the following arguments are required: chapter"),
        (["rum"], "invalid choice: 'rum'"),
        (["run", "toy", "--fast"], "unrecognized arguments: --fast"),
        (["run", "broken"], "is not a valid notebook"),
        (["compare", "toy", "xyz"], "no run or chapter 'xyz'"),
        (["compare", "toy"], "required: B"),
        (["check", "toi"], "no chapter 'toi'"),
        (["new", "Toy"], "is no slug"),
        (["new", "toy"], "chapters/toy.ipynb exists"),
        (["new", "patchin"], "no family 'patchin' in papers.bib; did you mean patching?"),
        (["new", "patching", "--paper", "jones"], "no paper 'jones' in the family patching"),
        (["new", "toy", "--paper", "smith2024toy"], "has a section on smith2024toy"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(book, capsys, arguments, message):
    (book / "chapters" / "broken.ipynb").write_text('{"cells": [{"cell_type"')
    before = sorted(path.name for path in book.rglob("*"))
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("book: ") and said.err.count("\n") == 1 and message in said.err
    assert said.out == ""
    assert sorted(path.name for path in book.rglob("*")) == before, "nothing was begun"


def test_a_folder_that_is_no_book_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("BOOK_ROOT", str(tmp_path))
    assert cli.main(["status"]) == 2
    assert "has no folder chapters/" in capsys.readouterr().err


def test_help_and_errors_come_quickly(book):
    """Nothing heavy is imported before it is needed."""
    heavy = "import sys; from lib.book import cli; cli.main(['run', 'toi']);"
    heavy += "print([m for m in ('torch', 'papermill', 'nbconvert', 'psutil') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True,
                          cwd=REPOSITORY, env={**os.environ, "BOOK_ROOT": str(book)})  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_leaves_a_complete_record(book, capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    code = cli.main(["run", "toy", "--profile", "smoke", "-p", "rate=1.5", "-p", "flag=false"])
    assert code == 0
    said = capsys.readouterr().out
    assert said.startswith("[1/15] Parameters\n[4/15] A toy\n") and "0 of 1 claims held" in said
    facts = records(book)[-1]
    folder = book / "runs" / "toy" / facts["id"]
    assert facts["status"] == "ok" and facts["error"] is None
    assert facts["parameters"] == {"n": 2, "mode": "fine", "rate": 1.5, "flag": False}
    assert facts["profile"] == "smoke" and facts["seconds"] > 0 and facts["peak_gib"] > 0.02
    assert facts["versions"]["python"] and facts["machine"]["cores"] >= 1
    assert facts["machine"]["memory_gib"] > 0 and "commit" in facts["source"]
    assert [claim["holds"] for claim in facts["claims"]] == [False]
    notebook = places.read_notebook(folder / "notebook.ipynb")
    printed = [o.text for c in notebook.cells for o in c.get("outputs", []) if o.get("text")]
    assert printed[0] == "chapters 1 0 2 fine 1.5 False 4\n"
    page = (folder / "notebook.html").read_text(encoding="utf-8")
    assert "more is more" in page and 'alt="one dot"' in page
    assert not re.search(r"<(script|link)[^>]+(src|href)=.http", page)
    assert {path.name for path in folder.iterdir()} == {
        "notebook.ipynb",
        "notebook.html",
        "run.json",
    }
    assert chapter(book) == places.read_notebook(book / "chapters" / "toy.ipynb")


def test_a_log_is_kept_of_a_kernel_that_died_and_of_no_other(book):
    mutter = "os.write(2, b'zmq mutters')"  # past Python, as a library in C does
    for mode, kept in (("fine", False), ("die", True)):
        notebook = chapter(book)
        notebook.cells[4].source = f"import os\n{mutter}\n{BEHAVE}"
        save(book, notebook)
        assert cli.main(["run", "toy", "-p", f"mode={mode}"]) == kept
        log = book / "runs" / "toy" / records(book)[-1]["id"] / "kernel.log"
        assert log.exists() == kept and (not kept or "zmq mutters" in log.read_text())


def test_a_failed_run_keeps_what_it_had(book, capsys):
    for mode, error in (("fail", "ValueError: of it"), ("die", "Kernel died")):
        assert cli.main(["run", "toy", "-p", f"mode={mode}"]) == 1
        said = capsys.readouterr().err
        facts = next(facts for facts in records(book) if facts["id"] in said)  # both in one second
        partial = f"runs/toy/{facts['id']}/notebook.ipynb"
        assert said.strip().splitlines()[-1].startswith("book: toy failed in cell 6 (Parameters): ")
        assert error in said and partial in said and "Traceback" not in said
        assert facts["status"] == "failed" and facts["error"] == error
        assert places.read_notebook(book / partial).cells


def test_ctrl_c_leaves_a_valid_record_and_no_kernel(book):
    process = command(book, "run", "toy", "-p", "mode=sleep", start_new_session=True)
    for _ in range(600):
        if (book / "asleep").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.startswith("book: interrupted in cell") and "Traceback" not in said
    facts = records(book)[-1]
    assert facts["status"] == "interrupted" and facts["seconds"] > 0
    assert places.read_notebook(book / "runs" / "toy" / facts["id"] / "notebook.ipynb").cells
    assert not list((book / "runs").rglob("*.tmp"))
    assert chapter(book).metadata.book.last_run


def test_two_runs_at_once_never_meet(book):
    both = [command(book, "run", "toy", "--store"), command(book, "run", "toy", "--store")]
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    new = records(book)[-2:]
    assert len(records(book)) == 3 and len({facts["id"] for facts in records(book)}) == 3
    assert all(facts["status"] == "ok" for facts in new)
    assert stale.stale("toy", book) == []


# --- storing --------------------------------------------------------------------------------------


def test_stored_outputs_are_clean_and_complete(ran):
    notebook = chapter(ran)
    source = toy()
    assert [c.source for c in notebook.cells] == [c.source for c in source.cells]
    assert [c.id for c in notebook.cells] == [c.id for c in source.cells]
    assert [c.metadata for c in notebook.cells] == [c.metadata for c in source.cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    figure = notebook.cells[7].outputs
    assert [o.output_type for o in figure] == ["display_data"] * 2 + ["stream", "execute_result"]
    assert figure[0].metadata["image/png"]["alt"] == "one dot"
    assert dict(figure[1].data) == {"text/html": "<b>panel</b>"}, "a panel without its live view"
    assert figure[2].text == "one\ntwo\n", "pieces of one stream are joined"
    text = json.dumps(notebook)
    assert "papermill" not in json.dumps([c.metadata for c in notebook.cells])
    assert "widget-view" not in re.sub(re.escape(json.dumps(FIGURE)[1:-1]), "", text)
    assert set(notebook.metadata) == {"book", "kernelspec", "language_info"}
    run = notebook.metadata.book.last_run
    assert {"date", "seconds", "peak_gib", "versions", "hash", "parts"} == set(run)
    assert notebook.metadata.book.measured.default == {k: run[k] for k in ("seconds", "peak_gib")}


def test_storing_twice_gives_the_same_bytes(book):
    def stable():
        notebook = chapter(book)
        for name in ("date", "seconds", "peak_gib"):
            del notebook.metadata.book.last_run[name]
        del notebook.metadata.book["measured"]
        return places.notebook_text(notebook)

    before = stable()
    runs.run("toy", store=True, book=book, quiet=True)
    assert stable() == before


def test_a_warning_or_an_edit_is_not_stored(book, capsys):
    warn = "import sys\nprint('careful', file=sys.stderr)"
    edit = (
        "text = open('toy.ipynb').read()\nopen('toy.ipynb', 'w').write(text.replace('All', 'No'))"
    )
    for source, message in ((warn, "warning in output (stderr): careful"), (edit, "was edited")):
        notebook = chapter(book)
        notebook.cells[4].source = f"{BEHAVE}\n{source}"
        save(book, notebook)
        outputs = [cell.get("outputs") for cell in notebook.cells]
        assert cli.main(["run", "toy", "--store"]) == 1
        assert message in capsys.readouterr().err
        assert [cell.get("outputs") for cell in chapter(book).cells] == outputs
        assert records(book)[-1]["status"] == "ok"


def test_measure_notes_a_profile_and_nothing_else(book):
    before = chapter(book)
    runs.run("toy", profile="smoke", measure=True, book=book, quiet=True)
    after = chapter(book)
    smoke = after.metadata.book.measured.pop("smoke")
    assert after == before and smoke["seconds"] > 0 and smoke["peak_gib"] > 0
    assert stale.stale("toy", book) == []


# --- staleness ------------------------------------------------------------------------------------


def test_fresh_after_storing(ran):
    assert stale.stale("toy", ran) == []
    assert set(chapter(ran).metadata.book.last_run.parts) == {
        "code", "lib/__init__.py", "lib/claims.py", "lib/tool.py", "lib/rooms/__init__.py",
        "lib/rooms/deep.py", "lib/rooms/beside.py", "data/toy/numbers.txt", "data/named.txt",
        "data/archive.npz",
        "lock",
    }  # fmt: skip


@pytest.mark.parametrize(
    "file, change, reasons",
    [
        ("lib/tool.py", lambda text: text.replace("deep.twice(x)", "x + x"), ["lib/tool.py"]),
        ("lib/rooms/deep.py", lambda text: text.replace("2", "3"), ["lib/rooms/deep.py"]),
        (
            "lib/tool.py",
            lambda text: text.replace("a comment", "another").replace("Doub", "Tw"),
            [],
        ),
        ("lib/tool.py", lambda text: text.replace("\n", "\r\n"), []),
        ("lib/alone.py", lambda text: text + "x = 1\n", []),
        ("data/toy/numbers.txt", lambda text: "1\n", ["data/toy/numbers.txt"]),
        ("data/toy/more.txt", lambda text: "1\n", ["data/toy/more.txt"]),
        ("data/named.txt", lambda text: text * 2, ["data/named.txt"]),
        ("data/archive.npz", lambda text: text * 2, ["data/archive.npz"]),
        ("data/unnamed.txt", lambda text: text * 2, []),
        ("data/else/named.bin", lambda text: text * 2, []),
        ("data/else/named.txt", lambda text: text * 2, []),  # another file of the name that is read
        ("data/papers.bib", lambda text: text.replace("Works", "Runs"), []),
        ("requirements.lock", lambda text: text + "torch==2\n", ["lock"]),
    ],
)
def test_staleness_names_its_reason(book, file, change, reasons):
    path = book / file
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_bytes(change(old).encode())
    assert stale.stale("toy", book) == reasons


def test_code_is_a_reason_and_prose_and_outputs_are_not(book):
    notebook = chapter(book)
    notebook.cells[0].source += "\n\nMore prose."
    notebook.cells[7].outputs = notebook.cells[7].outputs[:1]
    save(book, notebook)
    assert stale.stale("toy", book) == []
    notebook.cells[2].source = PARAMETERS.replace("= 4", "= 5")
    save(book, notebook)
    assert stale.stale("toy", book) == ["code"]
    (book / "data" / "named.txt").unlink()
    assert stale.stale("toy", book) == ["code", "data/named.txt (gone)"]
    save(book, toy())
    assert stale.stale("toy", book) == ["never stored"]


def test_status_is_a_table_and_its_check_fails_on_stale(book, capsys):
    assert cli.main(["status", "--check"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"toy\s+fresh\s+\d{4}-\d\d-\d\d\s+[\d.]+\s+[\d.]+\s+1 of 1", said)
    (book / "lib" / "tool.py").write_text("def double(x):\n    return x + x\n")
    assert cli.main(["status"]) == 0
    assert cli.main(["status", "--check"]) == 1
    assert "stale: lib/tool.py, lib/rooms/__init__.py (gone)" in capsys.readouterr().out


# --- comparing ------------------------------------------------------------------------------------


def written(book: Path, name: str, **changes) -> str:
    """A record written by hand."""
    facts = {"chapter": "toy", "id": name, "status": "ok", "profile": "default", "seconds": 1.0,
             "peak_gib": 0.1, "parameters": {"n": 4}, "versions": {"python": "3"}}  # fmt: skip
    folder = book / "runs" / "toy" / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(facts | changes))
    return name


def test_compare_shows_flips_first(book, capsys):
    def claims(*verdicts):
        return [{"paper": f"p{i}", "says": f"s{i}", "paper_value": "1", "ours": str(i), "holds": v}
                for i, v in enumerate(verdicts)]  # fmt: skip

    written(book, "alpha", claims=claims(True, True, True))
    written(book, "alpine", claims=claims(True, True, False, True), parameters={"n": 9})
    assert cli.main(["compare", "alpha", str(book / "runs" / "toy" / "alpine")]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if re.search(r"\bp\d\b", line)]
    assert [row[0] for row in rows] == ["FLIPPED", "only", "p0", "p1"] and rows[0][1] == "p2"
    assert "claims: 1 flipped of 4" in said and re.search(r"n\s+4\s+9", said)
    assert "versions: the same" in said
    assert cli.main(["compare", "al", "alpha"]) == 2
    assert "begins 2 run ids" in capsys.readouterr().err
    assert cli.main(["compare", "toy", "alph"]) == 0
    said = capsys.readouterr().out
    assert "toy, stored" in said and "only in A" in said and "smith2024toy" in said


def test_a_damaged_record_is_one_line(book, capsys):
    written(book, "beta")
    (book / "runs" / "toy" / "beta" / "run.json").write_text("{")
    assert cli.main(["compare", "beta", "toy"]) == 2
    assert "no readable run.json" in capsys.readouterr().err


# --- checking -------------------------------------------------------------------------------------


def test_the_toy_passes_its_checks(book, capsys):
    assert cli.main(["check"]) == 0
    assert capsys.readouterr().out == "1 chapter ok\n"


def replace(index, old, new):
    def change(notebook):
        assert old in notebook.cells[index].source
        notebook.cells[index].source = notebook.cells[index].source.replace(old, new)

    return change


def append(source, index=7):
    def change(notebook):
        notebook.cells[index].source += f"\n{source}"

    return change


def tag(index, *tags):
    return lambda notebook: notebook.cells[index].metadata.update(tags=list(tags))


def drop(index):
    return lambda notebook: notebook.cells.pop(index)


def fact(**values):
    return lambda notebook: notebook.metadata.book.update(values)


def output(*outputs, index=7):
    return lambda notebook: notebook.cells[index].outputs.extend(outputs)


def shows(**data):
    data = {name.replace("_", "/"): value for name, value in data.items()}
    return output(new_output("display_data", data))


# A change that breaks one rule of the guide, and words of the finding; None for no finding.
BROKEN = [
    (replace(0, "# Toy", "Toy"), "no title"),
    (append("# Another", 5), "a second title `# Another`"),
    (fact(title="Other"), "is not metadata book.title"),
    (replace(0, "You will see that a chapter with all its parts runs and", "It"), "no promise"),
    (replace(0, "{chapter-card}", "{note}"), "no card"),
    (fact(summary=""), "metadata book.summary is ''"),
    (fact(prerequisites=["tow"]), "prerequisite 'tow' is no chapter; did you mean toy?"),
    (fact(profiles={"smoke": {}}), "no profile full"),
    (fact(profiles={"smoke": {"m": 1}, "full": {}}), "profile smoke: no parameter 'm'"),
    (fact(profiles={"smoke": {"n": 99}, "full": {}}), "99 is outside 1–10"),
    (drop(5), "no section `## The idea`"),
    (
        lambda nb: nb.cells.insert(5, nb.cells.pop(9)),
        "`## Explore` stands before `## The idea`",
    ),
    (lambda nb: nb.cells.append(new_markdown_cell("## Odd")), "`## Odd` stands outside"),
    (replace(9, "## Explore", "Some words.\n\n## Explore"), "`## Explore` is inside a cell"),
    (tag(2), "no cell tagged `parameters`"),
    (tag(4, "parameters"), "more than one cell tagged `parameters`"),
    (replace(3, "{parameters-table}", "{note}"), "no table: put ```{parameters-table}```"),
    (replace(2, "; how many", ""), "n has no description"),
    (replace(2, "# 1–10 prompts; how many", "# some"), "begins with no range"),
    (replace(6, "(paper-smith2024toy)=\n", ""), "no section on smith2024toy"),
    (replace(6, "paper-smith2024toy", "paper-smyth"), "no paper 'smyth' in papers.bib"),
    (replace(6, "{cite}`smith2024toy`", "Smith"), "smith2024toy is not cited in its section"),
    (lambda nb: nb.cells[8].update(outputs=[]), "no claim for smith2024toy"),
    (lambda nb: nb.cells[8].update(outputs=[]), "with no stored output"),
    (replace(8, "n > 3", "True"), "holds is typed in (True)"),
    (replace(8, "n > 3", "holds=not False"), "holds is typed in (not False)"),
    (append("yes = True", 7), None),
    (lambda nb: (append("yes = True")(nb), replace(8, "n > 3", "yes")(nb)), "typed in (yes)"),
    (replace(8, 'f"{2 * n:.1f}"', '"8.0"'), "ours is typed in ('8.0')"),
    (replace(8, 'claims.claim("smith2024toy", ', "claims.claim(*x, "), "are unpacked"),
    (tag(8), "tag the cell nbval-check-output"),
    (output(new_output("stream", text="x"), index=8), "a claim cell shows something else"),
    (lambda nb: nb.cells.insert(9, new_code_cell("1", execution_count=1)), "code after the"),
    (replace(-2, "held_up()", "made"), "no table of claims"),
    (lambda nb: nb.cells[-3].update(source="## What held up"), "no frank paragraph"),
    (lambda nb: nb.cells.__delitem__(slice(11, 15)), "2 exercises"),
    (replace(11, " (easy, 5 min)", ""), "has no size"),
    (replace(11, ":label: toy-one\n", ""), "has no `:label:`"),
    (drop(13), "has exercise-answer, exercise-solution"),
    (replace(12, "...", "3"), "the answer cell is filled in"),
    (tag(14, "exercise-solution"), "tag it `hide-cell` too"),
    (append("\n" * 40), "lines: split it"),
    (append("%timeit 1"), "a line magic"),
    (append("x ="), "not valid Python"),
    (tag(7, "raises-exception"), "allowed to fail"),
    (append('open("/home/me/x")'), "a path of one machine (/home/me/x"),
    (append("See /tmp/x.", 5), "a path of one machine (/tmp/x"),
    (append("import requests"), "imports requests"),
    (append("from urllib.request import urlopen"), "imports urllib"),
    (append("from lib import datasets"), None),
    (append('AutoModel.from_pretrained("org/name")'), "is a hub id"),
    (append('models.load("org/name")'), "is a hub id"),
    (append("MNIST(download=True)"), "fetches"),
    (append("import pickle"), "pickle uses a pickle"),
    (append('torch.load("x.pt")'), "torch.load uses a pickle"),
    (append("np.load(x, allow_pickle=True)"), "allow_pickle=True"),
    (append('x.to("cuda")'), "names a device"),
    (output(new_output("error", ename="E", evalue="", traceback=[])), "a stored error (E)"),
    (output(new_output("stream", name="stderr", text="w")), "a stored warning"),
    (output(new_output("stream", text="5%|█  | 1/20")), "a progress bar"),
    (output(new_output("stream", text="<f at 0x7f00aa11bb22>")), "an object's address"),
    (shows(text_html="<i>/root/x</i>"), "a path of one machine in its output"),
    (shows(image_png=PNG), "a figure without alt text"),
    (shows(text_html="<img src='x'>"), "an <img> without alt text"),
    (shows(text_plain="x" * 1_600_000), "MB at most"),
    (fact(todo=["smith2024toy"]), "list papers of the family with no section"),
]


@pytest.mark.parametrize("change, message", BROKEN, ids=[message for _, message in BROKEN])
def test_check_finds(book, change, message):
    notebook = chapter(book)
    change(notebook)
    save(book, notebook)
    found = [line for line in check.findings(book, "toy") if "stale" not in line]
    if message is None:
        assert found == []
        return
    assert any(message in line for line in found), found
    assert all(line.startswith("chapters/toy.ipynb: ") for line in found)


def test_check_finds_a_stale_and_an_unlisted_chapter(book, capsys):
    (book / "_toc.yml").write_text("format: jb-book\nroot: chapters/intro\n")
    (book / "requirements.lock").write_text("numpy==3\n")
    assert cli.main(["check", "toy"]) == 1
    said = capsys.readouterr().out
    assert "add `- file: chapters/toy` to _toc.yml" in said and "stale (lock)" in said
    assert said.endswith("1 chapter: 2 findings\n")


SCRIPTS = sorted(Path(__file__).parents[1].glob("data/*/*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_makes_the_data_fetches_nothing_and_pickles_nothing(path):
    code = SimpleNamespace(trees={0: ast.parse(path.read_text())})
    assert [*check_code.network(code), *check_code.pickles(code)] == []


# --- new chapters ---------------------------------------------------------------------------------


def test_a_new_chapter_runs_and_passes_its_checks(tmp_path, monkeypatch, capsys):
    """The scaffold runs on the real library and model, so this is the slowest test here."""
    book = make(tmp_path / "book")
    shutil.rmtree(book / "lib")
    save(book, toy())
    monkeypatch.setenv("BOOK_ROOT", str(book))
    assert cli.main(["new", "patching"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert cli.main(["check", "patching"]) == 0
    assert "1 paper to write: jones2023other" in capsys.readouterr().out
    assert cli.main(["check", "patching", "--complete"]) == 1
    toc = FILES["_toc.yml"].replace("  # a toy\n", "  # a toy\n      - file: chapters/patching\n")
    assert (book / "_toc.yml").read_text() == toc
    before = (book / "chapters" / "patching.ipynb").read_text()
    assert cli.main(["new", "patching"]) == 2
    assert (book / "chapters" / "patching.ipynb").read_text() == before
    assert cli.main(["new", "patching", "--paper", "jones2023other"]) == 0
    capsys.readouterr()
    assert cli.main(["check", "patching"]) == 1
    said = capsys.readouterr().out
    assert "no claim for jones2023other" in said and "holds is typed in" in said
    assert "todo" not in places.read_notebook(book / "chapters" / "patching.ipynb").metadata.book


# --- claims under nbval ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored, now, same",
    [
        ("0.87 ± 0.02", "0.86 ± 0.03", True),
        ("0.87 ± 0.02", "0.80 ± 0.02", False),
        ("22,500 at layer 12", "22,900 at layer 12", True),
        ("22,500 at layer 12", "22,500 at layer 13", False),
        ("3 of 7 heads", "4 of 7 heads", False),
        ("3 % less", "4 % less", True),
        ("3 % less", "6 % less", False),
        ("1.2e-5", "1.3e-5", True),
        ("1.2e-5", "1.2e-4", False),
        ("-0.5", "0.5", False),
        ("0.5 more", "0.5 less", False),
        ("0.5", "0.5 and 0.5", False),
    ],
)
def test_measured_values_agree_within_tolerance(stored, now, same):
    assert nbval_claims.alike(stored, now) is same


NBVAL = """
from IPython.display import display

def claim(ours, holds=True, **more):
    made = dict(paper="p", says="s", paper_value="1", ours=ours, holds=holds) | more
    display({"application/vnd.book.claim+json": made, "text/html": ours}, raw=True)

def table(*ours):
    made = [dict(paper="p", says="s", paper_value="1", ours=o, holds=True) for o in ours]
    display({"application/vnd.book.claims+json": made, "text/plain": str(ours)}, raw=True)
"""
CELLS = [
    ("claim('0.512')", "claim('0.5')", True),
    ("claim('0.5'); claim('0.6')", "claim('0.5'); claim('0.6')", True),
    ("table('0.51', '2')", "table('0.5', '2')", True),
    ("claim('0.5', False)", "claim('0.5')", False),
    ("claim('0.9')", "claim('0.5')", False),
    ("pass", "claim('0.5')", False),
    ("claim('0.5'); claim('0.5')", "claim('0.5')", False),
    ("claim('0.5', says='t')", "claim('0.5')", False),
    ("claim('0.5', paper_value='2')", "claim('0.5')", False),
    ("table('0.5')", "table('0.5', '2')", False),
    ("claim('0.5'); print('b')", "claim('0.5'); print('a')", False),
    ("print('a')", "print('a')", True),
]


def test_nbval_fails_on_flipped_changed_and_vanished_claims(tmp_path):
    """One notebook: its stored outputs are those of each cell's second source."""
    from nbclient import NotebookClient

    tagged = {"tags": ["nbval-check-output"]}
    cells = [new_code_cell(source, metadata=tagged) for _, source, _ in CELLS]
    notebook = new_notebook(cells=[new_code_cell(NBVAL), *cells])
    NotebookClient(notebook, kernel_name="python3").execute()
    for cell, (source, _, _) in zip(notebook.cells[1:], CELLS, strict=True):
        cell.source = source
    path = tmp_path / "claims.ipynb"
    nbformat.write(notebook, path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "lib.book.nbval_claims", "--nbval-lax", "-rA",
         "--nbval-current-env", "-p", "no:cacheprovider", "--rootdir", tmp_path, path],
        capture_output=True, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    verdict = {
        int(number): word == "PASSED"
        for word, number in re.findall(r"(?m)^(PASSED|FAILED) .*?Cell (\d+)", done.stdout)
    }
    expected = {0: True} | {number: same for number, (_, _, same) in enumerate(CELLS, 1)}
    assert verdict == expected, done.stdout


# --- the book itself ------------------------------------------------------------------------------

REAL = sorted(path.stem for path in (REPOSITORY / "chapters").glob("*.ipynb"))


@pytest.mark.parametrize("slug", REAL)
def test_no_checked_cell_passes_on_nothing(slug):
    """nbval lets a checked cell with no stored output pass, so it must have one."""
    notebook = places.read_notebook(REPOSITORY / "chapters" / f"{slug}.ipynb")
    for index, cell in enumerate(notebook.cells):
        if "nbval-check-output" in cell.metadata.get("tags", []):
            assert cell.outputs and cell.execution_count, places.cell_name(notebook, index)


@pytest.mark.parametrize("slug", REAL)
def test_every_chapter_passes_its_checks(slug):
    assert check.findings(REPOSITORY, slug) == []
