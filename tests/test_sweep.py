"""`book sweep` on a throw-away book: points, kills, interruptions, clusters, page and tables.

A point costs about a second, the start of its kernel. `BOOK_SWEEP_POINTS=200` makes the load test
as large as a real sweep (minutes); by default it is small.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pandas
import psutil
import pytest
import test_book
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from test_book import REPOSITORY, command, save

from lib.book import cli, places, record, sweep_page, sweep_plan, sweep_store, sweep_table
from lib.errors import BookError

POINTS = int(os.environ.get("BOOK_SWEEP_POINTS", "12"))
PARAMETERS = """\
n: int = 4  # 1–500 things; how many
rate: float = 0.5  # 0–2 Hz; a speed
mode: str = "fine"  # fine | slow | fail | die | sleep; what the run does
data_file: str = "none"  # any file; numbers to read
word: str = " Mary"  # any text; said
seed: int = 3  # 0–9 seed; of the noise"""
CODE = """\
import os
import time
from pathlib import Path

from lib import claims

with open(os.environ.get("TOY_LOG", os.devnull), "a") as log:
    log.write(f"{n} {rate} {mode} {word} {seed}\\n")
if mode == "fail":
    raise ValueError("too much")
if mode == "die":
    os._exit(3)
if mode == "sleep":
    time.sleep(60)
if mode == "slow":
    time.sleep(1)
if data_file != "none":
    print(Path(data_file).read_text())
value = 2 * n + seed / 10"""
CLAIM = """\
claims.claim("smith2024toy", "more is more", "2.0 (Table 1)", f"{value:.1f}", value > 8)
claims.claim("smith2024toy", "slow < fast & \\"loose\\"", "no", "words", rate < 1)"""


def make(folder: Path) -> Path:
    """A book with one chapter that takes no time."""
    book = test_book.make(folder)
    cells = [
        new_markdown_cell("# Toy\n\n## Parameters"),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell(CODE),
        new_code_cell(CLAIM, metadata={"tags": ["nbval-check-output"]}),
    ]
    notebook = new_notebook(cells=cells)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata["book"] = {"profiles": {"smoke": {"n": 2, "seed": 8}}}
    save(book, notebook)
    return book


@pytest.fixture
def book(tmp_path, monkeypatch):
    """The book, `BOOK_ROOT` at it, and a log that every run of a point adds a line to."""
    folder = make(tmp_path / "book")
    monkeypatch.setenv("BOOK_ROOT", str(folder))
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    monkeypatch.chdir(tmp_path)
    return folder


def plan(book: Path, *typed: str, **settings) -> sweep_plan.Plan:
    slug, notebook = sweep_plan.read_chapter(book, "toy")
    return sweep_plan.make(book, slug, notebook, list(typed), **settings)


def sweeps(book: Path) -> list[Path]:
    return sorted((book / "runs" / "toy" / "sweeps").glob("*/sweep.json"))


def state(book: Path) -> dict:
    (only,) = sweeps(book)
    return json.loads(only.read_text())


def finished(book: Path) -> dict[str, dict]:
    """The records of all finished points, by key."""
    return {path.parent.name: record.read(path.parent)
            for path in (book / "runs" / "toy").glob("p*/run.json")}  # fmt: skip


def ran(book: Path) -> list[str]:
    """A line for each time that a point ran far enough to say so."""
    log = book.parent / "log"
    return log.read_text().splitlines() if log.exists() else []


# --- points ---------------------------------------------------------------------------------------


def test_points_are_the_product_and_equal_ones_are_one(book):
    found = plan(book, "n=1,2, 4", "rate=0.5,1,1.0", 'word="a, b", Jo', profile="smoke")
    assert found.axes == {"n": [1, 2, 4], "rate": [0.5, 1.0], "word": ["a, b", " Jo"]}
    assert len(found.points) == 12 and found.repeated == 6
    assert found.fixed == {"mode": "fine", "data_file": "none", "seed": 8}
    assert len({point.key for point in found.points}) == 12
    assert [p.values["seed"] for p in plan(book, seeds=5).points] == [3, 4, 5, 6, 7]
    assert len(plan(book).points) == 1 and plan(book).axes == {}


def test_a_point_is_the_same_in_every_sweep_until_something_changes(book):
    first = plan(book, "n=1,2")
    assert plan(book, "n=2,1").id == first.id, "the order of the values is no matter"
    (two,) = plan(book, "n=2").points
    assert two in first.points and plan(book, "n=2", profile="smoke").points[0].key != two.key
    notebook = places.read_notebook(book / "chapters" / "toy.ipynb")
    notebook.cells[0].source += "\n\nProse."
    save(book, notebook)
    assert plan(book, "n=2").points == [two]
    (book / "lib" / "claims.py").write_text((book / "lib" / "claims.py").read_text() + "x = 1\n")
    assert plan(book, "n=2").points[0].key != two.key
    numbers = book.parent / "numbers.txt"
    numbers.write_text("1")
    (one,) = plan(book, "data_file=./numbers.txt").points
    assert one.values["data_file"] == str(numbers), "a run works in another folder"
    numbers.write_text("2")
    assert plan(book, "data_file=./numbers.txt").points[0].key != one.key


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["toi"], "no chapter 'toi'; did you mean toy?"),
        (["toy", "-p", "nn=1,2"], "no parameter 'nn'; did you mean n?"),
        (["toy", "-p", "n=1,two"], "parameter n must be of type int, not 'two'"),
        (["toy", "-p", "n=1,501"], "parameter n: 501 is outside 1–500 things"),
        (["toy", "-p", "mode=fine,fast"], "'fast' is outside fine | slow"),
        (["toy", "-p", "n=1,,2"], "parameter n must be of type int, not ''"),
        (["toy", "-p", "n="], "parameter n must be of type int, not ''"),
        (["toy", "-p", "n"], "-p n: write -p name=value"),
        (["toy", "-p", "n=1", "-p", "n=2"], "-p n is given twice"),
        (["toy", "-p", 'word="a,b'], "a quote is not closed"),
        (["toy", "-p", "data_file=./gone.txt"], "data_file: no file or folder ./gone.txt"),
        (["toy", "--profile", "smok"], "no profile 'smok' in this chapter; did you mean smoke"),
        (["toy", "--seeds", "8"], "parameter seed: 10 is outside 0–9"),
        (["toy", "--seeds", "0"], "--seeds 0: give 1 or more"),
        (["toy", "--seeds", "two"], "invalid int value: 'two'"),
        (["toy", "--seeds", "2", "-p", "seed=1"], "--seeds and -p seed: give one of them"),
        (["toy", "--workers", "0"], "--workers 0: give 1 or more"),
        (["toy", "--workers", "2", "--scheduler", "tcp://x:1"], "give one of them"),
        (["toy", "--scheduler", "nonsense"], "no Dask scheduler at nonsense"),
        (["toy", "-p", f"n={','.join(map(str, range(1, 200)))}",
          "-p", f"rate={','.join(str(i / 100) for i in range(60))}"], "11940 points are too many"),
        (["toy", "--resume", "s1"], "--resume takes a sweep's id alone"),
        (["--resume", "s1"], "no sweep 's1'; there are none"),
        ([], "name a chapter, or a sweep with --resume"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(book, capsys, arguments, message):
    before = sorted(path.name for path in book.rglob("*"))
    assert cli.main(["sweep", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("book: ") and said.err.count("\n") == 1 and message in said.err
    assert sorted(path.name for path in book.rglob("*")) == before, "nothing was begun"


# --- locks ----------------------------------------------------------------------------------------


def test_a_lock_has_one_holder_and_does_not_outlive_it(tmp_path):
    path = tmp_path / "claims" / "p1"
    holder = "import sys, time; from lib.book.sweep_store import Lock; from pathlib import Path\n"
    holder += "print(Lock(Path(sys.argv[1])).take(), flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", holder, path], cwd=REPOSITORY, text=True,
                             stdout=subprocess.PIPE)  # fmt: skip
    assert other.stdout.readline() == "True\n"
    mine = sweep_store.Lock(path)
    assert not mine.take()
    other.kill()
    other.communicate()
    assert path.exists() and mine.take(), "the lock of a killed process is free at once"
    assert not sweep_store.Lock(path).take()
    mine.free()
    assert not path.exists() and sweep_store.Lock(path).take()


def test_many_threads_never_hold_one_lock_at_once(tmp_path):
    inside, most, turns = [], [], []

    def work():
        for _ in range(200):
            lock = sweep_store.Lock(tmp_path / "lock")
            if lock.take():
                inside.append(1)
                most.append(len(inside))
                inside.pop()
                turns.append(1)
                lock.free()

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert max(most) == 1 and len(turns) > 8


# --- sweeps ---------------------------------------------------------------------------------------


def test_a_sweep_leaves_its_points_a_page_and_tables(book, capsys):
    arguments = ["sweep", "toy", "-p", "n=1,20", "-p", "mode=fine,fail,die", "-p", "rate=1"]
    assert cli.main(arguments) == 1
    said = capsys.readouterr().out
    assert "6 points (n 2 × mode 3)\non " in said
    assert "failed: n 1, mode fail: ValueError: too much\n" in said
    assert "failed: n 20, mode die: Kernel died (2 times)\n" in said
    assert "toy: 2 of 6 points finished, 4 failed; " in said
    facts = state(book)
    assert facts["state"] == "incomplete" and facts["axes"] == {
        "n": [1, 20],
        "mode": ["fine", "fail", "die"],
    }
    (one, two) = finished(book).values()
    for each in (one, two):
        folder = book / "runs" / "toy" / each["id"]
        assert {path.name for path in folder.iterdir()} == {
            "notebook.ipynb", "notebook.html", "run.json",
        }  # fmt: skip
        assert each["point"] == each["id"] and each["sweep"] == facts["sweep"]
        assert each["parameters"]["rate"] == 1.0 and each["parameters"]["word"] == " Mary"
        assert set(each["source"]) == {"commit", "dirty", "parts"} and each["seconds"] > 0
        assert each["source"]["parts"] == facts["source"]["parts"]
    failed = [point for point in facts["points"] if point["state"] == "failed"]
    for point in failed:
        assert record.read(book / "runs" / "toy" / point["run"])["status"] == "failed"
    folder = sweeps(book)[0].parent
    frame = pandas.read_parquet(folder / "table.parquet")
    assert len(frame) == 2 * 2 + 4 and frame.seed.tolist() == [3] * 8
    assert frame[frame.says == "more is more"].value.tolist() == [2.3, 40.3]
    assert frame[frame.says == "more is more"].holds.tolist() == [False, True]
    assert frame[frame.state == "failed"].error.notna().all()
    assert pandas.read_csv(folder / "table.csv").n.tolist() == frame.n.tolist()
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "slow &lt; fast &amp; &#34;loose&#34;" in page and "4 failed" in page
    assert not re.search(r"(src|href)=.?(https?:|//)|<script|@import|url\(", page)
    assert len(links(page)) > 8
    for link in links(page):
        target = folder / "index.html" if link.startswith("#") else folder / link
        assert link == "data:," or target.is_file(), link

    # The same again: finished points stay, failed ones have another go, and nothing is left over.
    again = len(ran(book))
    assert cli.main(arguments) == 1
    assert sorted(ran(book)[again:]) == sorted(
        line for line in ran(book)[:again] if "fine" not in line
    )
    assert "2 finished before" in capsys.readouterr().out
    assert not list((book / "runs").rglob("*.tmp")) and not list((book / "runs/toy").glob(".s*"))
    assert not list((book / "runs" / "toy" / "sweeps" / ".claims").iterdir())


class Links(HTMLParser):
    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src")]


def links(page: str) -> list[str]:
    parser = Links()
    parser.found = []
    parser.feed(page)
    return parser.found


def marked(mark: str) -> list[psutil.Process]:
    """All processes that were started with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("TOY_MARK") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(true, seconds=60):
    for _ in range(int(seconds * 20)):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("waited too long")


def test_interrupted_and_killed_sweeps_go_on_and_leave_no_process(book, monkeypatch):
    monkeypatch.setenv("TOY_MARK", mark := f"{os.getpid()}-{time.time()}")
    arguments = ["sweep", "toy", "-p", "n=1,2,3,4,5", "-p", "mode=slow", "--workers", "2"]
    first = command(book, *arguments, start_new_session=True)
    wait_for(lambda: finished(book))
    os.killpg(first.pid, signal.SIGINT)  # as a terminal sends it: to every process at once
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130 and "Traceback" not in said
    assert re.fullmatch(r"book: interrupted; \d of 5 points are kept, .*--resume \w+` goes on\n",
                        said), said  # fmt: skip
    assert marked(mark) == [], "all were ended before the command came back"
    assert state(book)["state"] == "interrupted"
    before = finished(book)

    # An edit in between changes nothing for a sweep that is resumed by its id.
    notebook = places.read_notebook(book / "chapters" / "toy.ipynb")
    notebook.cells[2].source += "\nraise ValueError('edited')"
    save(book, notebook)
    resume = ["sweep", "--resume", state(book)["sweep"]]
    second = command(book, *resume, start_new_session=True)
    wait_for(lambda: len(finished(book)) > len(before))
    third = command(book, *resume)
    assert "is running already" in third.communicate(timeout=60)[1] and third.returncode == 2
    second.kill()  # no chance to clean up: its workers notice by themselves
    second.communicate()
    wait_for(lambda: marked(mark) == [], 20)
    kept = finished(book)

    assert cli.main(resume) == 0
    assert state(book)["state"] == "complete" and len(finished(book)) == 5
    for key, facts in kept.items():
        assert finished(book)[key] == facts, "a finished point is never run again"
    assert not list((book / "runs").rglob(".*-*")), "half-written folders are gone"


def test_two_sweeps_at_once_run_no_point_twice(book):
    both = [command(book, "sweep", "toy", "-p", f"n={values}", "--workers", "1")
            for values in ("1,2,3,4,5", "5,4,3,2,6")]  # fmt: skip
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert sorted(line.split()[0] for line in ran(book)) == list("123456")
    assert len(finished(book)) == 6 and len(sweeps(book)) == 2
    for path in sweeps(book):
        facts = json.loads(path.read_text())
        assert [point["state"] for point in facts["points"]] == ["ok"] * 5
        assert len(pandas.read_parquet(path.with_name("table.parquet"))) == 10


def kill_workers(process: subprocess.Popen, book: Path, chance: random.Random) -> int:
    """Kill one of a sweep's workers after every few points, at a random moment; how many."""
    killed = before = 0
    few = 2 if POINTS < 50 else 3
    while process.poll() is None:
        time.sleep(0.1)
        if len(finished(book)) < before + few:
            continue
        before = len(finished(book))
        time.sleep(chance.uniform(0, 1.5))
        try:
            children = psutil.Process(process.pid).children()
            workers = [each for each in children if "spawn_main" in " ".join(each.cmdline())]
            chance.choice(workers).kill()
            killed += 1
        except (psutil.Error, IndexError):
            continue
    return killed


def test_a_sweep_whose_workers_are_killed_is_complete_and_the_same(book, tmp_path, monkeypatch):
    values = f"n={','.join(str(n) for n in range(1, POINTS // 2 + 1))}"
    arguments = ["sweep", "toy", "-p", values, "-p", "rate=0.5,1.5", "--workers", "2"]
    calm = make(tmp_path / "calm")
    process = command(calm, *arguments)
    _, said = process.communicate(timeout=POINTS * 20)
    assert process.returncode == 0, said
    monkeypatch.setenv("TOY_MARK", mark := f"{os.getpid()}-{time.time()}")
    process = command(book, *arguments)
    killed = kill_workers(process, book, random.Random(0))
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    print(f"{killed} workers killed; the last lines: {out.splitlines()[-2:]}")
    assert killed >= POINTS // 5 and re.search(r"\d+ retried", out)
    wait_for(lambda: marked(mark) == [], 20)

    stormy, undisturbed = finished(book), finished(calm)
    assert len(stormy) == 2 * (POINTS // 2) and set(stormy) == set(undisturbed)
    for key, facts in stormy.items():
        for name in ("status", "parameters", "claims", "point", "versions", "profile"):
            assert facts[name] == undisturbed[key][name], name
        both = [places.read_notebook(root / "runs" / "toy" / key / "notebook.ipynb")
                for root in (book, calm)]  # fmt: skip
        assert [[cell.get("outputs") for cell in each.cells] for each in both][0] == [
            cell.get("outputs") for cell in both[1].cells
        ]
    tables = [pandas.read_parquet(next(root.rglob("table.parquet"))) for root in (book, calm)]
    tables = [table.drop(columns=["seconds", "peak_gib", "tries"]) for table in tables]
    pandas.testing.assert_frame_equal(*tables)


# --- a cluster that is there already --------------------------------------------------------------

# A worker that cannot import this repository, and lies in a folder of its own.
STRANGER = (
    "import sys; sys.modules['lib'] = None\nfrom distributed.cli.dask_worker import main\nmain()"
)


@pytest.fixture
def scheduler(tmp_path):
    """The address of a Dask scheduler with one worker, as other people start them."""
    address = tmp_path / "scheduler.json"
    started = [subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1",
         "--port", "0", "--no-dashboard", "--scheduler-file", address],
        cwd=tmp_path, stderr=subprocess.DEVNULL,
    )]  # fmt: skip
    wait_for(lambda: address.is_file() and address.stat().st_size)
    where = json.loads(address.read_text())["address"]
    environment = {name: value for name, value in os.environ.items() if name != "BOOK_ROOT"}
    started.append(subprocess.Popen(
        [sys.executable, "-c", STRANGER, where, "--no-nanny", "--nthreads", "2", "--no-dashboard",
         "--local-directory", tmp_path / "scratch"],
        cwd=tmp_path, stderr=subprocess.DEVNULL, env=environment,
    ))  # fmt: skip
    yield where
    for process in started[::-1]:
        process.terminate()
        process.wait(30)


def test_a_sweep_on_another_cluster_sends_all_and_gets_all(book, scheduler, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} two three")
    code = cli.main(["sweep", "toy", "-p", "data_file=./one.txt,./two.txt", "-p", "n=1,9",
                     "--scheduler", scheduler])  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    assert f"on the cluster at {scheduler}" in said.out
    assert len(finished(book)) == 4
    for key, facts in finished(book).items():
        typed = facts["parameters"]["data_file"]
        assert typed in (str(tmp_path / "one.txt"), str(tmp_path / "two.txt"))
        notebook = places.read_notebook(book / "runs" / "toy" / key / "notebook.ipynb")
        printed = "".join(
            o.text for c in notebook.cells for o in c.get("outputs", []) if "text" in o
        )
        assert printed == f"{Path(typed).stem} two three\n"
        injected = next(
            c.source for c in notebook.cells if "injected" in str(c.metadata.get("tags"))
        )
        assert "given/" in injected and str(book) not in injected, "it ran in the worker's own copy"
    left = [path for path in (tmp_path / "scratch").rglob("*book*")]
    assert left == [], "the worker's machine is as it was"


# --- a model of the reader's own ------------------------------------------------------------------


def tiny_llama(folder: Path) -> None:
    """A random Llama of two layers and a tokenizer of three words, as `save_pretrained` writes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def test_a_model_may_be_a_local_folder_and_a_missing_one_is_one_line(book, tmp_path, capsys):
    tiny_llama(tmp_path / "tiny")
    notebook = new_notebook(cells=[
        new_markdown_cell("# Toy\n\n## Parameters"),
        new_code_cell('model_name: str = "smollm2"  # any name; a model',
                      metadata={"tags": ["parameters"]}),
        new_code_cell("from lib import hooks, models\n\n"
                      "model, tokenizer = models.load(model_name)\n"
                      'print(hooks.shape(model)["n_layers"], tokenizer("one two").input_ids)'),
    ])  # fmt: skip
    notebook.metadata["book"] = {}
    save(book, notebook)
    for path in sorted(
        (book / "lib").rglob("*"), reverse=True
    ):  # the library itself, not the toy's
        path.unlink() if path.is_file() else path.rmdir()
    (book / "lib").rmdir()
    assert cli.main(["run", "toy", "-p", "model_name=./tiny"]) == 0, capsys.readouterr().err
    (path,) = (book / "runs" / "toy").glob("*/notebook.ipynb")
    printed = [o.text for c in places.read_notebook(path).cells for o in c.get("outputs", [])
               if o.name == "stdout"]  # fmt: skip
    assert printed == ["2 [1, 2]\n"]
    facts = record.read(path.parent)
    assert facts["parameters"]["model_name"] == str(tmp_path / "tiny")
    capsys.readouterr()
    for typed, code, message in [
        ("./tinny", 2, f"parameter model_name: no file or folder ./tinny in {tmp_path}"),
        ("smolm2", 1, 'no model "smolm2" here (did you mean "smollm2"?)'),
    ]:
        assert cli.main(["run", "toy", "-p", f"model_name={typed}"]) == code
        said = capsys.readouterr().err
        assert said.startswith("book: ") and said.count("\n") == 1 and message in said


# --- page, tables, comparing ----------------------------------------------------------------------


def made(axes: dict, ours, holds, **changes) -> tuple[dict, dict]:
    """The state and the records of a sweep made by hand; `ours` and `holds` take the parameters."""
    from itertools import product

    points, records = [], {}
    for number, values in enumerate(product(*axes.values())):
        values, key = dict(zip(axes, values, strict=True)), f"p{number}"
        points.append({"key": key, "parameters": values, "state": "ok", "run": key, "tries": 1,
                       "seconds": 1.0, "error": None})  # fmt: skip
        claim = {"paper": "smith2024toy", "says": "more is more", "paper_value": "2",
                 "ours": ours(**values), "holds": holds(**values)}  # fmt: skip
        machine = {"cpu": "c", "cores": 1, "memory_gib": 1.0, "gpu": None}
        records[key] = {"claims": [claim], "seconds": 1.0, "peak_gib": 0.1, "versions": {"x": "1"},
                        "status": "ok", "parameters": {"fixed": 1} | values,
                        "machine": machine}  # fmt: skip
    state = {"sweep": "sfeed", "chapter": "toy", "profile": "smoke", "state": "complete",
             "started": "2026-01-01T00:00:00+00:00", "ended": None, "axes": axes,
             "fixed": {"fixed": 1}, "versions": {"x": "1"}, "points": points,
             "source": {"commit": None, "dirty": None, "parts": {}}}  # fmt: skip
    return state | changes, records


def test_a_heat_map_puts_seeds_into_one_cell_and_other_parameters_beside_it():
    axes = {"a": [4, 1, 2], "seed": [0, 1], "word": ["x", "y"], "b": [1, 2]}
    state, records = made(axes, lambda a, b, seed, word: f"{a * b + seed} units",
                          lambda a, seed, **_: a + seed > 1)  # fmt: skip
    points = [sweep_page._point(point, records[point["key"]]) for point in state["points"]]
    ordered = {name: sweep_page._ordered(values) for name, values in axes.items()}
    found = sweep_page.heat_map(("smith2024toy", "more is more"), ordered, points)
    assert (found["x"], found["y"]) == ("a", "word") and found["columns"] == [1, 2, 4]
    assert [table["title"] for table in found["tables"]] == ["b 1", "b 2"]
    cell = found["tables"][1]["lines"][0]["cells"][0]
    assert cell["said"] == "2.5 ± 0.71" and (cell["held"], cell["total"]) == (1, 2)
    assert cell["depth"] == round(10 * (2.5 - 1) / (9 - 1)) and len(cell["marks"]) == 2
    page = sweep_page.html(state, records)
    assert page.count('href="../../p') == 2 * len(points), "each run from its cell and its row"
    assert "12 of 12" in page and "8 of 24" not in page


def test_a_page_shows_what_is_missing():
    state, records = made({"a": [1, 2, 3, 4]}, lambda a: f"{a} words", lambda a: True)
    state["points"][0] |= {"state": "failed", "error": "ValueError: <b>", "run": None}
    state["points"][1] |= {"state": "waiting", "run": None}
    for key in ("p0", "p1"):
        del records[key]
    page = sweep_page.html(state | {"state": "running"}, records)
    assert "ValueError: &lt;b&gt;" in page and "1 to come" in page and "1 failed" in page
    assert 'http-equiv="refresh"' in page
    assert "No finished run has a claim." in sweep_page.html(state, {})
    rows = sweep_table.rows(state, records)
    assert [row["holds"] for row in rows] == [None, None, True, True]


@pytest.mark.parametrize(
    "ours, value",
    [("0.87 ± 0.02", 0.87), ("−3.5 nats", -3.5), ("22,500 at layer 12", 22500), ("1e-3", 1e-3),
     ("L18H6: weight 0.99", 0.99), ("none", None), ("", None), (0.5, 0.5)],
)  # fmt: skip
def test_the_number_of_a_claim(ours, value):
    assert sweep_table.number(ours) == value


def keep(book: Path, name: str, state: dict, records: dict) -> None:
    """Write a sweep made by hand."""
    for key, facts in records.items():
        (book / "runs" / "toy" / f"{name}-{key}").mkdir(parents=True)
        places.write_json(book / "runs" / "toy" / f"{name}-{key}" / "run.json", facts)
    for point in state["points"]:
        point["run"] = f"{name}-{point['key']}"
    (book / "runs" / "toy" / "sweeps" / name).mkdir(parents=True)
    places.write_json(book / "runs/toy/sweeps" / name / "sweep.json", state | {"sweep": name})


def test_compare_shows_the_flips_of_two_sweeps_first(book, capsys):
    keep(book, "sa1", *made({"a": [1, 2, 3], "b": ["x"]}, lambda a, b: str(a), lambda a, b: a > 1))
    other = made({"a": [2, 3, 4], "b": ["x"]}, lambda a, b: f"{a}.0", lambda a, b: a > 2,
                 fixed={"fixed": 2}, versions={"x": "2"})  # fmt: skip
    for facts in other[1].values():
        facts["parameters"]["fixed"] = 2
        if facts["parameters"]["a"] == 3:
            facts["claims"].append(facts["claims"][0] | {"says": "new"})
    keep(book, "sb2", *other)
    assert cli.main(["compare", "sa", str(book / "runs" / "toy" / "sweeps" / "sb2")]) == 0
    said = capsys.readouterr().out
    assert "points in both: 2; only in A: 1; only in B: 1\nclaims: 1 flipped of 3" in said
    rows = [line for line in said.splitlines() if "smith2024toy" in line]
    assert re.match(r"FLIPPED\s+a 2, b x\s+smith2024toy\s+held: 2\s+not held: 2\.0", rows[0])
    assert rows[1].startswith("only in B  a 3, b x") and "2 of 2  1 of 2  more is more" in rows[2]
    assert re.search(r"fixed\s+1\s+2", said) and re.search(r"x\s+1\s+2", said)
    assert re.search(r"a\s+1, 2, 3\s+2, 3, 4", said)
    for arguments, message in [
        (["sa1", test_book.written(book, "alpha")], "compare two runs or two sweeps"),
        (["sz", "sa1"], "no run or chapter 'sz'"),
        (["sc", "sa1"], "no run or chapter 'sc'"),
    ]:  # fmt: skip
        assert cli.main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_damaged_point_is_named(book, capsys):
    key = plan(book, "n=1").points[0].key
    (book / "runs" / "toy" / key).mkdir(parents=True)
    with pytest.raises(BookError, match=f"runs/toy/{key} is damaged: delete it"):
        sweep_store.Store(book, "toy", "s1").finished(key)
