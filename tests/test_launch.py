"""The book elsewhere: as one PDF, behind launch buttons, in an image, in Colab."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from sphinx.errors import ConfigError
from test_site import SmallBook, claim, notebook

from lib.book import build, cli, pdf, places, site_launch
from lib.errors import BookError

ROOT = places.root()
ADDRESS = "https://github.com/someone/activations"


# ---------------------------------------------------------------- launch buttons


def test_without_an_address_the_theme_gets_no_launch_buttons():
    options = {"repository_url": " ", "launch_buttons": {"colab_url": "x"}, "repository_branch": ""}
    assert site_launch.launch(options) == {"repository_branch": ""}
    assert site_launch.launch({}) == {}


@pytest.mark.parametrize("end", ["", "/", ".git"])
def test_an_address_is_taken_however_it_ends(end):
    options = {"repository_url": ADDRESS + end, "launch_buttons": {"colab_url": "x"}}
    assert site_launch.launch(options) == {**options, "repository_url": ADDRESS}


@pytest.mark.parametrize(
    "bad", ["someone/activations", "https://github.com/someone", "https://github.com/OWNER/<NAME>"]
)
def test_an_address_that_would_make_dead_buttons_is_refused(bad):
    with pytest.raises(ConfigError, match="repository_url in _config.yml is .*OWNER/NAME"):
        site_launch.launch({"repository_url": bad})


def test_the_address_is_one_setting_and_its_buttons_are_for_binder_and_colab():
    text = (ROOT / "_config.yml").read_text(encoding="utf-8")
    options = yaml.safe_load(text)["sphinx"]["config"]["html_theme_options"]
    assert text.count("repository_url:") == 1
    assert {"binderhub_url", "colab_url"} < set(options["launch_buttons"])


# ---------------------------------------------------------------- a small book, with and without

PANEL = """<div class="explore" id="explore-1"><div class="explore-controls">
<div class="explore-control"><label for="e-0">layer</label><input type="range" id="e-0" min="0"
 max="1" value="0"><output for="e-0">7</output></div>
<div class="explore-control"><label for="e-1">word</label><select id="e-1"><option value="0"
 selected>cat<option value="1">dog</select></div></div>
<div class="explore-screen"><p>the first state</p></div>
<script type="application/json" class="explore-states">["one", "the hidden state"]</script>
<script>1</script></div>"""
WIDE = "<table><tr>" + "".join(f"<td>{'w' * 30}{i}</td>" for i in range(12)) + "</tr></table>"


def html_cell(source, html, tags=()):
    output = new_output("display_data", {"text/html": html})
    return new_code_cell(source, outputs=[output], execution_count=2, metadata={"tags": [*tags]})


def chapter():
    """A chapter with what is hard on paper."""
    made = notebook(
        claim(), markdown=r"$$\sum_i " + "+".join(f"x_{{{i}}}" for i in range(40)) + "$$"
    )
    exercise = "```{exercise} Count\n:label: ex-count\n\nCount to three.\n```"
    made.cells += [
        html_cell("table()", WIDE),
        html_cell("panel()", PANEL),
        new_code_cell("x = '" + "long " * 90 + "'\n" * 70),
        new_markdown_cell(exercise + "\n\nBack to the [intro](intro.md)."),
        new_code_cell("the_solution = 3", metadata={"tags": ["exercise-solution", "hide-cell"]}),
        new_code_cell("folded_away = 1", metadata={"tags": ["hide-input"]}),
    ]
    return made


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    book = SmallBook(tmp_path_factory.mktemp("launch"))
    book.chapter(chapter())
    book.page("intro.md", "# Intro\n\nRead [patching](patching.ipynb).\n")
    assert build.build(book.folder) == 0
    return book


def test_no_page_shows_a_launch_button_while_there_is_no_address(small):
    for page in ("intro", "patching", "scoreboard"):
        soup = small.soup(page)
        assert not soup.select(".dropdown-launch-buttons")
        assert not re.search("mybinder|colab", str(soup))


def test_with_an_address_chapters_open_in_binder_and_colab(small, tmp_path):
    config = small.folder / "_config.yml"
    before = config.read_text(encoding="utf-8")
    text = before.replace('repository_url: ""', f"repository_url: {ADDRESS}/")
    config.write_text(text, encoding="utf-8")
    try:
        assert text != before and build.build(small.folder, out=tmp_path) == 0
    finally:
        config.write_text(before, encoding="utf-8")
    soup = BeautifulSoup((tmp_path / "html/chapters/patching.html").read_text(), "html.parser")
    found = [link["href"] for link in soup.select(".dropdown-launch-buttons a")]
    path = "chapters/patching.ipynb"
    assert found == [
        f"https://mybinder.org/v2/gh/someone/activations/main?urlpath=lab/tree/{path}",
        f"https://colab.research.google.com/github/someone/activations/blob/main/{path}",
    ]
    loaded = [one.get("src") or one.get("href") for one in soup.select("[src], link[href]")]
    assert not [one for one in loaded if re.match("(https?:)?//", one)]
    images = soup.select(".dropdown-launch-buttons img")
    assert images and all(image["alt"] for image in images)
    plain = BeautifulSoup((tmp_path / "html/chapters/intro.html").read_text(), "html.parser")
    assert not plain.select(".dropdown-launch-buttons")  # nothing to run there


# ---------------------------------------------------------------- the PDF


@pytest.fixture(scope="module")
def document(small):
    """The combined page, as a file in a folder beside the pages."""
    where = small.folder / "_build" / "paper"
    where.mkdir()
    pages = pdf._pages(small.folder, small.folder / "_build/html")
    (where / "book.html").write_text(pdf.combined(small.folder, pages, where), encoding="utf-8")
    return where / "book.html"


def test_the_combined_page_has_every_page_once_and_no_broken_link(small, document):
    soup = BeautifulSoup(document.read_text(encoding="utf-8"), "html.parser")
    chapters = [section["id"] for section in soup.select("section.chapter")]
    names = [path.stem for path in build.toc_pages(small.folder)]
    assert chapters == [f"{name}--page" for name in names] and len(names) >= 4
    assert [a["href"] for a in soup.select("nav.toc a")] == [f"#{one}" for one in chapters]
    ids = [tag["id"] for tag in soup.select("[id]") if not tag.find_parent("svg")]
    assert len(ids) == len(set(ids))
    inner = [link["href"][1:] for link in soup.select("a[href^='#']")]
    assert len(inner) > 6 and set(inner) <= set(ids)
    files = [*soup.select("img[src]"), *soup.select("link[href]")]
    paths = [(tag.get("src") or tag["href"]).partition("?")[0] for tag in files]
    assert paths and all((document.parent / path).is_file() for path in paths)


def test_paper_gets_a_panels_first_state_and_solutions_at_the_end(document):
    soup = BeautifulSoup(document.read_text(encoding="utf-8"), "html.parser")
    text = soup.select_one("#patching--page").get_text(" ", strip=True)
    assert "Shown for layer 7, word cat." in text and "the first state" in text
    assert "hidden state" not in text and "folded_away" not in text and "Show the" not in text
    assert not soup.select("article :is(script, input, select, button)")
    exercise, solutions = text.index("Count to three"), text.index("Solutions")
    assert exercise < text.index("The solution is at the end") < solutions
    assert text.index("the_solution", solutions) and text.count("the_solution") == 1


def test_a_book_without_chromium_says_so_in_one_line_before_it_builds(small, monkeypatch, capsys):
    monkeypatch.setattr(pdf.shutil, "which", lambda name: None)
    monkeypatch.setattr(pdf, "MAC", Path("/nowhere"))
    monkeypatch.setattr(build, "run_sphinx", lambda *_: pytest.fail("it was built"))
    monkeypatch.setenv("BOOK_ROOT", str(small.folder))
    assert cli.main(["build", "--pdf"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert "Chromium or Chrome" in said.err


def test_chromium_that_prints_nothing_is_an_error(tmp_path):
    (tmp_path / "book.html").write_text("x")
    with pytest.raises(BookError, match="Chromium printed no PDF"):
        pdf._print("/bin/false", tmp_path / "book.html", tmp_path / "book.pdf")


@pytest.fixture(scope="module")
def browser():
    try:
        return pdf.chromium()
    except BookError:
        pytest.skip("no Chromium here: the PDF is not printed")


def test_the_pdf_has_pages_an_outline_figures_and_a_numbered_contents(small, browser):
    made = pdf.make(small.folder, small.folder / "_build")
    assert made == small.folder / "_build/book.pdf"
    data = made.read_bytes()
    assert data.startswith(b"%PDF") and b"/Outlines" in data and b"/Subtype /Image" in data
    assert not list((small.folder / "_build").glob(".pdf-*"))
    at = pdf.page_numbers(made)
    order = [at[f"{name}--page"] for name in ("intro", "patching", "scoreboard", "bibliography")]
    assert order[0] == 3 and order == sorted(set(order))  # after the cover and the contents
    assert order[2] - order[1] >= 2, "the long cell needs a second page"
    pages = int(re.search(rb"/Type /Pages\s*/Count (\d+)", data)[1])
    assert order[-1] <= pages < 40
    text = '<span class="toc-number" data-page="patching--page"></span>'
    assert pdf._numbered(text, at).endswith(f">{order[1]}</span>")


def test_nothing_is_cut_at_the_edge_of_the_paper(document, browser, tmp_path):
    text = document.read_text(encoding="utf-8")
    check = document.with_name("check.html")
    check.write_text(text.replace("</body>", f"<script>{CUT}</script></body>"), encoding="utf-8")
    own = f"--user-data-dir={tmp_path}"
    done = subprocess.run(
        [browser, *pdf.FLAGS, own, "--virtual-time-budget=5000", "--dump-dom", check.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = json.loads(BeautifulSoup(done.stdout, "html.parser").select_one("#cut").text)
    assert found["fitted"] >= 1, "the wide table was not made to fit"
    assert found["cut"] == []


CUT = """addEventListener("load", () => document.fonts.ready.then(() => setTimeout(() => {
  const cut = [];
  for (const article of document.querySelectorAll("article")) {
    const edge = article.getBoundingClientRect().right + 1.5;
    for (const e of article.querySelectorAll("*"))
      if (e.getBoundingClientRect().right > edge) cut.push(e.outerHTML.slice(0, 120));
  }
  const out = document.createElement("pre");
  out.id = "cut";
  out.textContent = JSON.stringify({cut: cut.slice(0, 5),
    fitted: [...document.querySelectorAll("article *")].filter((e) => e.style.zoom).length});
  document.body.append(out);
}, 500)));"""


# ---------------------------------------------------------------- image, dev container, Colab


def test_the_image_installs_the_lock_file_as_the_makefile_does_and_runs_as_a_plain_user():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if re.match("[A-Z]+ ", line)]
    assert steps[0][1].startswith("python:3.11")
    users = [value for step, value in steps if step == "USER"]
    assert users and users[-1] not in ("root", "0")
    order = [f"{step} {value}" for step, value in steps]
    made = next(i for i, line in enumerate(order) if "make .venv/ready" in line)
    assert made > next(i for i, line in enumerate(order) if line.startswith("USER"))
    copied = " ".join(line for line in order[:made] if line.startswith("COPY"))
    assert all(
        name in copied for name in ("Makefile", "pyproject.toml", "requirements.lock", "lib")
    )
    assert "\n.venv/ready:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert steps[-1][0] == "CMD" and json.loads(steps[-1][1])[:2] == ["jupyter", "lab"]


def test_what_is_made_here_stays_out_of_the_image():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {".venv", "_build", "runs"} <= set(ignored)
    needed = ("lib", "data", "chapters", "requirements.lock", "README.md", "Makefile", ".git")
    assert not set(needed) & set(ignored)


def test_the_dev_container_is_valid_json_and_uses_the_makefile():
    about = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    assert about["image"].endswith("python:3.11-bookworm")
    assert "make .venv/ready" in about["postCreateCommand"]
    assert "chromium-driver" in about["onCreateCommand"]  # the browser tests want it


def test_the_colab_cell_names_what_the_lock_file_has_and_models_need():
    from lib import models

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pattern = re.search(r"!grep -E '(.+)' /content/book/requirements.lock", text)[1]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    chosen = {line.partition("==")[0] for line in lock if re.search(pattern, line)}
    names = re.search(r"\((.+)\)", pattern)[1].split("|")
    assert all(any(re.fullmatch(name, one) for one in chosen) for name in names)
    assert {package for package, _ in models._WHEELS.values()} <= chosen
    assert not chosen & {"torch", "numpy", "ipykernel", "tornado"}  # Colab's own stay


def test_the_changelog_and_the_citation_name_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"Version {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
