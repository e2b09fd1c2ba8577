"""The pages: built without a warning, complete, and good in a browser at two widths and modes.

The first part builds a small book and breaks it in several ways. The second builds this book and
reads its HTML. The third opens it in headless Chromium; it is skipped where there is none.
"""

import functools
import http.server
import json
import re
import shutil
import tempfile
import threading
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

from lib.book import build, places, site_data, site_math, site_scoreboard, stale
from lib.errors import BookError

ROOT = places.root()
CLAIM = "application/vnd.book.claim+json"
CLAIMS = "application/vnd.book.claims+json"
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5"
    "ErkJggg=="
)
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}


# ---------------------------------------------------------------- facts, without Sphinx


def claim(paper="one2024first", says="It moves.", holds=True):
    return {"paper": paper, "says": says, "paper_value": "9 (Table 1)", "ours": "8", "holds": holds}


BIBTEX = """
@misc{one2024first, title = {The {First} <Paper>}, author = {One, Ada and Two, Bo and Three, Cy},
  year = {2024}, eprint = {2401.00001}, keywords = {patching}}
@misc{two2023second, title = {Second}, author = {Tw\\"o, Bo}, year = {2023}, keywords = {sinks}}
"""


@pytest.fixture
def bib(tmp_path):
    path = tmp_path / "papers.bib"
    path.write_text(BIBTEX, encoding="utf-8")
    return path


def test_papers_are_read_with_plain_titles_names_and_addresses(bib):
    one, two = site_data.papers(bib)
    assert (one.title, one.byline) == ("The First <Paper>", "One et al. 2024")
    assert (one.url, one.family) == ("https://arxiv.org/abs/2401.00001", "patching")
    assert (two.authors, two.byline, two.url) == (("Twö",), "Twö 2023", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [("@misc{a, title = {x}", "cannot read"), ("@misc{a, keywords = {nonsense}}", "one family")],
)
def test_a_bad_bibliography_gets_one_line(tmp_path, text, message):
    path = tmp_path / "papers.bib"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BookError, match=message) as error:
        site_data.papers(path)
    assert "\n" not in str(error.value)


def chapter_with(*claims, slug="patching"):
    return site_data.Chapter(slug, {}, list(claims))


def test_the_score_counts_a_repeated_claim_once_and_papers_by_their_claims(bib):
    papers = site_data.papers(bib)
    chapter = chapter_with(claim(), claim(), claim(says="It stops.", holds=False))
    score = site_data.score(papers, site_data.claims_by_paper([chapter]))
    assert (score.papers, score.done, score.claims, score.held, score.failed) == (2, 1, 2, 1, 1)


@pytest.mark.parametrize(
    ("bad", "message"), [(claim(paper="nobody"), "nobody"), (claim(holds="yes"), "neither true")]
)
def test_a_claim_on_no_paper_or_without_a_verdict_is_refused(bib, bad, message):
    with pytest.raises(BookError, match=message):
        site_data.check_claims([bad], site_data.papers(bib), "chapters/x.ipynb")


def test_the_scoreboard_links_escapes_and_names_what_is_not_written(bib):
    papers = site_data.papers(bib)
    html = site_scoreboard.scoreboard_html(
        papers,
        [chapter_with(claim(says="a < b & c"), claim(says="no", holds=False))],
        section={"one2024first": "patching.html#paper-one2024first"}.get,
        citation=lambda key: f"bibliography.html#{key}",
        page={"patching": "patching.html"}.get,
    )
    page = BeautifulSoup(html, "html.parser")
    assert "a < b & c" in page.text and "a < b" not in html
    assert page.select_one("#board-one2024first a.paper-section")["href"].endswith("one2024first")
    assert [row["data-verdict"] for row in page.select("tr[data-verdict]")] == ["held", "failed"]
    assert page.select_one("#board-two2023second").text.endswith("chapter not written yet")


def test_equations_become_mathml_and_a_wrong_one_is_an_error():
    html = site_math.to_mathml(r"\softmax\left(\frac{q^\top k}{\sqrt{d}}\right) \in \mathbb{R}^n")
    assert html.startswith("<math") and "<mfrac>" in html and "ℝ" in html
    assert "<mtable" in site_math.to_mathml(r"\begin{align*}a &= b \\ c &= d\end{align*}", True)
    with pytest.raises(site_math.LatexError, match="nosuch"):
        site_math.to_mathml(r"\nosuch{x}")


def test_a_log_is_cut_to_the_lines_that_name_a_problem():
    book = Path("/somewhere/book")
    log = (
        "Running Jupyter-Book\n\x1b[31m/somewhere/book/chapters/a.ipynb:70012: WARNING: x\x1b[0m\n"
        "/somewhere/book/chapters/a.ipynb:70012: WARNING: x\nTraceback (most recent call last)\n"
    )
    assert build.readable(log, book) == ["chapters/a.ipynb: cell 6, line 12: WARNING: x"]


# ---------------------------------------------------------------- a small book, broken in turn


def notebook(*claims, markdown="", alt="A figure of one pixel."):
    cells = [
        nbformat.v4.new_markdown_cell("# Patching\n\n```{chapter-card}\n```\n\n" + markdown),
        nbformat.v4.new_code_cell(
            "n: int = 3  # 1–9 prompts; how many", metadata={"tags": ["parameters"]}
        ),
        nbformat.v4.new_markdown_cell(
            "```{parameters-table}\n```\n\n(paper-one2024first)=\n## One"
        ),
    ]
    outputs = [
        nbformat.v4.new_output("display_data", {CLAIM: one, "text/html": "no"}) for one in claims
    ]
    figure = {"image/png": {"alt": alt} if alt else {}}
    outputs.append(nbformat.v4.new_output("display_data", {"image/png": PIXEL}, metadata=figure))
    cells.append(nbformat.v4.new_code_cell("claim()", outputs=outputs, execution_count=1))
    made = nbformat.v4.new_notebook(cells=cells)
    made.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "P"}
    made.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    made.metadata["book"] = {"title": "Patching", "models": ["SmolLM2"], "data": []}
    return made


GLOSSARY = """# Notation

```{glossary}
latent
  One entry of a dictionary.

dictionary
  A set of directions.
```
"""
PROSE = """A `dictionary` of $dictionary$ and [dictionary](notation.md).

## Dictionary

Two dictionaries hold one latent each. A second latent."""


class SmallBook:
    def __init__(self, folder):
        self.folder = folder
        for name in ("chapters", "data", "lib"):
            (folder / name).mkdir()
        shutil.copy(ROOT / "_config.yml", folder)
        shutil.copytree(ROOT / "chapters/_static", folder / "chapters/_static")
        for page in ("scoreboard.md", "bibliography.md"):
            shutil.copy(ROOT / "chapters" / page, folder / "chapters")
        self.page("intro.md", "# Intro\n")
        self.page("notation.md", GLOSSARY)
        for board in ("execution", "figures", "paths"):
            self.page(f"{board}.md", f"# {board}\n\n```{{{board}}}\n```\n")
        (folder / "data/papers.bib").write_text(BIBTEX, encoding="utf-8")
        names = ["patching", "scoreboard", "bibliography", "notation"]
        names += ["execution", "figures", "paths"]
        toc = "".join(f"  - file: chapters/{name}\n" for name in names)
        toc = f"format: jb-book\nroot: chapters/intro\nchapters:\n{toc}"
        (folder / "_toc.yml").write_text(toc, encoding="utf-8")
        self.chapter(notebook(claim()))

    def page(self, name, text):
        (self.folder / "chapters" / name).write_text(text, encoding="utf-8")

    def chapter(self, made, fresh=True):
        if fresh:
            parts = stale.parts(self.folder, "patching", made)
            made.metadata["book"]["last_run"] = {"date": "2026-01-02", "parts": parts}
        nbformat.write(made, self.folder / "chapters/patching.ipynb")

    def number(self, name):
        return int(self.soup("scoreboard").select_one(f"#n-{name}").text)

    def soup(self, page):
        text = (self.folder / f"_build/html/chapters/{page}.html").read_text(encoding="utf-8")
        return BeautifulSoup(text, "html.parser")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallBook(tmp_path_factory.mktemp("small"))


def test_a_warning_fails_the_build_each_time_and_is_one_line(small, capsys):
    small.page("intro.md", "# Intro\n\nSee {doc}`nowhere`, $\\nosuch$.\n")
    for _ in range(2):  # Sphinx alone passes the second time
        assert build.build(small.folder) == 1
        lines = capsys.readouterr().err.splitlines()
        assert any("intro.md:3: WARNING: unknown document" in line for line in lines)
        assert any("nosuch" in line for line in lines)
        assert not any("Traceback" in line or str(small.folder) in line for line in lines)


def test_a_good_book_builds_and_says_where(small, capsys):
    small.page("intro.md", "# Intro\n\n```{families}\n```\n")
    small.chapter(notebook(claim(), claim(says="no", holds=False)))
    assert build.build(small.folder) == 0
    assert capsys.readouterr().out.strip().endswith("_build/html/index.html")
    chapter = small.soup("patching")
    assert [row.text for row in chapter.select(".claim .verdict")] == ["✓ held", "✗ not held"]
    assert chapter.select_one("img[alt='A figure of one pixel.']")
    card = chapter.select_one("dl.chapter-card").text
    assert "One et al. (2024)" in card and "1 of 2 held" in card and "2026-01-02" in card
    cells = [cell.text for cell in chapter.select("table.parameters td")]
    assert cells == ["n", "int", "3", "1–9 prompts", "how many"]
    assert (small.number("claims"), small.number("held")) == (2, 1)
    assert small.soup("intro").select_one(".map-written a")["href"] == "patching.html"


def test_terms_figures_runs_and_paths_are_made_from_the_chapters(small):
    small.chapter(notebook(claim(says="a latent"), markdown=PROSE))
    assert build.build(small.folder) == 0
    terms = small.soup("patching").select("a.term")
    assert [term.text for term in terms] == ["dictionaries", "latent"]
    assert terms[0]["href"] == "notation.html#term-dictionary"
    assert terms[0]["title"] == "A set of directions."
    assert "one latent each" in terms[1].parent.text

    figure = small.soup("figures").select_one("ol.figures li")
    assert figure.a["href"] == "patching.html#figure-1" and figure.a.text == "One"
    assert figure.p.text == "A figure of one pixel."
    assert (small.folder / "_build/html/chapters" / figure.img["src"]).is_file()
    assert small.soup("patching").select_one("img#figure-1")
    row = [cell.text for cell in small.soup("execution").select("tbody tr > *")]
    assert row[:3] == ["Patching", "✓ fresh", "2026-01-02"]
    paths = small.soup("paths")
    assert {a["href"] for a in paths.select(".path li a")} == {"patching.html"}
    assert small.soup("patching").select_one(".path-nav")["hidden"] == ""
    assert not small.soup("scoreboard").select(".path-nav")

    # the chapter itself does not change, yet its links follow the glossary
    small.page("notation.md", GLOSSARY.replace("dictionary\n  A set", "basis\n  A set"))
    assert build.build(small.folder) == 0
    assert [term.text for term in small.soup("patching").select("a.term")] == ["latent"]


def test_the_scoreboard_follows_a_chapter_that_alone_has_changed(small):
    small.chapter(notebook(claim(), claim(says="no"), claim(paper="two2023second")))
    assert build.build(small.folder) == 0
    assert [small.number(name) for name in ("papers", "done", "claims", "held")] == [2, 2, 3, 3]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (notebook(claim(), alt=""), "a figure without alt text"),
        (notebook(claim(paper="nobody")), "'nobody'"),
        (notebook(claim(), markdown="{cite}`nobody2020`"), "nobody2020"),
    ],
    ids=["no alt text", "unknown paper", "unknown citation"],
)
def test_what_a_reader_would_miss_fails_the_build(small, capsys, made, message):
    small.chapter(made)
    assert build.build(small.folder) == 1
    assert message in capsys.readouterr().err


def test_a_stale_chapter_is_refused_with_its_reason(small, capsys):
    small.chapter(notebook(claim()))
    made = notebook(claim())
    made.metadata["book"]["last_run"] = {"parts": stale.parts(small.folder, "patching", made)}
    made.cells[-1].source = "claim(2)"
    small.chapter(made, fresh=False)
    assert build.build(small.folder) == 1
    assert "chapters/patching.ipynb is stale: code" in capsys.readouterr().err


def test_execute_reruns_what_is_stale_and_nothing_else(small, monkeypatch):
    small.chapter(notebook(claim()))
    reran = []
    monkeypatch.setattr(build, "rerun", reran.append)
    assert build.build(small.folder, execute=True) == 0 and reran == []
    stored = small.folder / "chapters/patching.ipynb"
    stored.write_text(stored.read_text().replace("claim()", "claim(2)"))

    def rerun(slug):
        reran.append(slug)
        small.chapter(notebook(claim()))

    monkeypatch.setattr(build, "rerun", rerun)
    assert build.build(small.folder, execute=True) == 0 and reran == ["patching"]


def test_a_page_that_is_not_there_is_named(small):
    toc = small.folder / "_toc.yml"
    before = toc.read_text()
    toc.write_text(before.replace("scoreboard", "scorebord"))
    try:
        with pytest.raises(BookError, match="scorebord, .* did you mean chapters/scoreboard"):
            build.build(small.folder)
    finally:
        toc.write_text(before)


def test_two_builds_into_one_folder_do_not_mix(small):
    small.chapter(notebook(claim()))
    with build.alone(small.folder / "_build"):
        with pytest.raises(BookError, match="another build is running"):
            build.build(small.folder)


# ---------------------------------------------------------------- this book


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of this book's pages, built anew with warnings as errors."""
    out = tmp_path_factory.mktemp("site")
    assert build.build(ROOT, out=out) == 0, "the build failed; its lines are above"
    return out / "html"


@pytest.fixture(scope="session")
def pages(site):
    """Path below `site` → parsed page."""
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    found = [name for name in found if not name.startswith("_static/")]  # the theme's templates
    texts = {name: (site / name).read_text(encoding="utf-8") for name in found}
    return {name: BeautifulSoup(text, "html.parser") for name, text in texts.items()}


def test_every_page_of_the_contents_is_there(site, pages):
    wanted = {
        path.relative_to(ROOT).with_suffix(".html").as_posix() for path in build.toc_pages(ROOT)
    }
    assert wanted <= set(pages)
    front = (site / "index.html").read_text(encoding="utf-8")
    target = re.search(r"url=([^\"]+)", front)
    assert target and (site / target[1]).is_file()
    icon = re.search(r'rel="icon" href="([^"]+)"', front)
    assert icon and (site / icon[1]).is_file()


def test_no_internal_link_is_broken(site, pages):
    broken = []
    for name, page in pages.items():
        for tag, attribute in (("a", "href"), ("link", "href"), ("script", "src"), ("img", "src")):
            for element in page.find_all(tag, **{attribute: True}):
                if problem := _broken(site, pages, name, element[attribute]):
                    broken.append(f"{name}: {problem}")
    assert not broken


def _broken(site, pages, name, address):
    if re.match(r"(https?|mailto|data):", address) or address in ("", "#"):
        return None
    path, _, fragment = address.partition("#")
    file = (site / name).parent / path.partition("?")[0] if path else site / name
    if not file.resolve().is_file():
        return address
    page = pages.get(file.resolve().relative_to(site.resolve()).as_posix())
    if fragment and page and not page.find(id=fragment) and not page.find(attrs={"name": fragment}):
        return address
    return None


def test_nothing_is_loaded_from_another_host(pages):
    loads = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
    found = [
        f"{name}: {element[attribute]}"
        for name, page in pages.items()
        for tag, attribute in loads.items()
        for element in page.find_all(tag, **{attribute: re.compile(r"^(https?:)?//")})
        if not {"canonical", "search"} & set(element.get("rel", []))
    ]
    assert not found


def test_every_image_has_an_alt_text(pages):
    missing = [
        f"{name}: {image.get('src', '')[:80]}"
        for name, page in pages.items()
        for image in page.find_all("img")
        if not (image.get("alt") or "").strip() or image["alt"].startswith("../")
    ]
    drawn = [
        f"{name}: svg"
        for name, page in pages.items()
        for svg in page.select("article svg")
        if not (svg.get("aria-label") or svg.get("aria-hidden") or svg.find("title"))
    ]
    assert not missing + drawn


def test_the_text_of_the_intro_counts_right():
    papers = site_data.papers(ROOT / site_data.BIB)
    text = (ROOT / "chapters/intro.md").read_text(encoding="utf-8")
    assert f"{len(papers)} papers in {len(site_data.FAMILIES)} families" in text


def test_the_scoreboard_equals_a_recount_of_the_notebooks(pages):
    claims = set()
    for path in (ROOT / "chapters").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                one = output.get("data", {}).get(CLAIM)
                if one:
                    claims.add((path.stem, one["paper"], one["says"], one["holds"]))
    page = pages["chapters/scoreboard.html"]
    shown = {name: int(page.select_one(f"#n-{name}").text) for name in ("papers", "done", "claims")}
    entries = re.findall(r"(?m)^@\w+\{", (ROOT / "data/papers.bib").read_text(encoding="utf-8"))
    done = {paper for _, paper, _, _ in claims}
    assert shown == {"papers": len(entries), "done": len(done), "claims": len(claims)}
    held = sum(holds for *_, holds in claims)
    assert int(page.select_one("#n-held").text) == held
    assert int(page.select_one("#n-failed").text) == len(claims) - held
    assert len(page.select("article.paper")) == len(entries)
    assert len(page.select("tr[data-verdict]")) == len(claims)
    for paper in done:
        assert page.select_one(f"#board-{paper} a.paper-section"), f"no section link for {paper}"


def notebooks(pages):
    """Slug → page, of the chapters."""
    found = {path.stem for path in build.toc_pages(ROOT) if path.suffix == ".ipynb"}
    return {slug: pages[f"chapters/{slug}.html"] for slug in sorted(found)}


def test_the_index_of_figures_has_every_figure_of_every_chapter(pages):
    index = pages["chapters/figures.html"]
    for slug, page in notebooks(pages).items():
        shown = [
            i.get("alt") for i in page.select("article img") if not i.find_parent(class_="explore")
        ]
        panels = page.select("article .explore")
        drawn = [svg for svg in page.select("article svg") if not svg.find_parent(class_="explore")]
        links = [a for a in index.select("li a") if a["href"].startswith(f"{slug}.html#")]
        assert len(links) == len(shown) + len(panels) + len(drawn), slug
        words = {a.parent.p.text for a in links}
        assert set(shown) <= words and "" not in words, slug
        assert {a["href"].partition("#")[2] for a in links} >= {panel["id"] for panel in panels}


def test_the_execution_report_says_what_the_notebooks_say(pages):
    report = pages["chapters/execution.html"]
    rows = {
        row.a["href"]: [cell.text for cell in row.select("td")]
        for row in report.select("tr:has(a)")
    }
    assert set(rows) == {f"{slug}.html" for slug in notebooks(pages)}
    versions = report.select_one(".execution-report").text.replace("\xa0", " ")
    for slug in notebooks(pages):
        facts = places.read_notebook(places.chapter_path(ROOT, slug)).metadata["book"]
        state, date, *costs = rows[f"{slug}.html"]
        assert (state, date) == ("✓ fresh", facts["last_run"]["date"])
        for cost, name in zip(costs, ("smoke", "default", "full"), strict=True):
            run = facts["measured"].get(name)
            wanted = f"{run['seconds']:.0f} s, {run['peak_gib']:.1f} GiB" if run else "not measured"
            assert cost == wanted, (slug, name)
        for name, number in facts["last_run"]["versions"].items():
            assert f"{name} {number}" in versions, slug


def test_chapters_link_each_term_once_and_in_prose_only(pages):
    for slug, page in notebooks(pages).items():
        terms = page.select("a.term")
        assert len(terms) >= 3, f"{slug} links to no glossary"
        anchors = [term["href"] for term in terms]
        assert len(set(anchors)) == len(anchors), slug
        for term in terms:
            assert term["title"] and term.find_parent("p"), (slug, term)
            assert not term.find_parent(["h1", "h2", "h3", "pre", "code", "table", "math", "a"])


def test_every_paper_is_in_the_bibliography_once(pages):
    papers = site_data.papers(ROOT / site_data.BIB)
    assert len(pages["chapters/bibliography.html"].select(".citation")) == len(papers)


# ---------------------------------------------------------------- in a browser

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)  # fmt: skip


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def address(site):
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium with chromedriver here: the pages are not opened in a browser")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    profile = tempfile.mkdtemp(prefix="book-chromium-")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    running = webdriver.Chrome(options=options, service=Service(driver))
    yield running
    running.quit()
    shutil.rmtree(profile, ignore_errors=True)


def open_page(browser, address, name, size="desktop", mode="light"):
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    script = f"localStorage.setItem('mode', '{mode}'); localStorage.setItem('theme', '{mode}')"
    if getattr(browser, "book_mode", None) != mode:
        browser.get(f"{address}/search.html")
        browser.execute_script(script)
        browser.book_mode = mode
    browser.get(f"{address}/{name}")
    assert browser.execute_script("return document.documentElement.dataset.theme") == mode


def names_of(pages):
    return [name for name in pages if name.startswith("chapters/")]


def test_pages_load_without_an_error_or_a_request_to_another_host(browser, address, pages):
    browser.get_log("browser"), browser.get_log("performance")
    for name in [*names_of(pages), "search.html", "genindex.html", "index.html"]:
        open_page(browser, address, name)
        logged = browser.get_log("browser")
        errors = [entry["message"] for entry in logged if entry["level"] == "SEVERE"]
        assert not errors, f"{name}: {errors}"
        for entry in browser.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                own = url.startswith((address, "data:", "blob:", "chrome:"))
                assert own, f"{name} asks for {url}"


@pytest.mark.parametrize("size", SIZES)
def test_no_page_is_wider_than_the_window(browser, address, pages, size):
    wide = {}
    for name in names_of(pages):
        open_page(browser, address, name, size)
        for details in browser.find_elements("css selector", "details:not([open])"):
            browser.execute_script("arguments[0].open = true", details)
        width = browser.execute_script("return document.documentElement.scrollWidth")
        out = browser.execute_script(TOO_WIDE, SIZES[size][0])
        if width > SIZES[size][0] or out:
            wide[name] = (width, out)
    assert not wide


# The innermost elements that stick out of the window and are in no box of the text that scrolls.
TOO_WIDE = """
const width = arguments[0], article = document.querySelector("article");
const out = [...article.querySelectorAll("*")].filter((e) => {
  if (e.getBoundingClientRect().right <= width + 1) return false;
  for (let p = e; p !== article; p = p.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return false;
  return true;
});
return out.slice(-3).map((e) => e.outerHTML.slice(0, 200));
"""


def test_equations_are_drawn_in_the_books_own_font(browser, address, pages):
    drawn = 0
    for name, page in pages.items():
        if not page.find("math"):
            continue
        open_page(browser, address, name)
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('math')].filter(m => !m.closest('details'))"
            ".map(m => [m.getBoundingClientRect().width, m.getBoundingClientRect().height])"
        )
        assert all(width > 2 and height > 4 for width, height in sizes), name
        family = "return getComputedStyle(document.querySelector('math')).fontFamily"
        assert browser.execute_script(family).startswith('"Book Math"')
        script = "const done = arguments[0]; document.fonts.load('16px \"Book Math\"', '𝑥')"
        loaded = browser.execute_async_script(script + ".then(f => done(f.length))")
        assert loaded == 1
        text = browser.execute_script("return document.querySelector('article').innerText")
        assert "\\(" not in text and "\\frac" not in text
        drawn += len(sizes)
    assert drawn, "no page has an equation"


def test_the_filter_of_the_scoreboard_narrows_and_widens(browser, address, pages):
    open_page(browser, address, "chapters/scoreboard.html")
    board = pages["chapters/scoreboard.html"]
    every = board.select("article.paper")
    count = (
        "return [...document.querySelectorAll('article.paper')].filter(p => p.offsetParent).length"
    )
    field = browser.find_element("id", "board-text")
    first = every[-1].select_one(".paper-title").text
    field.send_keys(first.upper())
    assert browser.execute_script(count) == 1
    field.clear()
    field.send_keys("zzzz")
    assert browser.execute_script(count) == 0
    assert browser.find_element("css selector", ".board-none").is_displayed()
    browser.execute_script(SET_VALUE, field, "")
    menu = browser.find_element("id", "board-verdict")
    for choice, selector in (("failed", "[data-verdict=failed]"), ("open", ".paper-open")):
        browser.execute_script(SET_VALUE, menu, choice)
        wanted = [paper for paper in every if paper.select_one(selector)]
        if choice == "open":
            wanted = [paper for paper in every if paper["data-state"] == "open"]
        assert browser.execute_script(count) == len(wanted)
        assert f"{len(wanted)} of {len(every)}" in browser.find_element("id", "board-count").text


SET_VALUE = """
arguments[0].value = arguments[1];
arguments[0].dispatchEvent(new Event("input", {bubbles: true}));
"""


def test_panels_answer_to_mouse_and_keyboard_without_a_kernel(browser, address, pages):
    from selenium.webdriver.common.keys import Keys

    with_panel = [name for name, page in pages.items() if page.select(".explore")]
    if not with_panel:
        pytest.skip("no page has a panel yet")
    for name in with_panel:
        browser.get_log("browser")
        open_page(browser, address, name)
        for panel in browser.find_elements("css selector", ".explore"):
            controls = panel.find_elements("css selector", "input, select")
            before = browser.execute_script(SCREEN, panel)
            for control in controls:
                browser.execute_script(OTHER, control)
            after = browser.execute_script(SCREEN, panel)
            assert before and after and before != after, f"{name}: the panel does not move"
            for control in controls:
                assert control.accessible_name, f"{name}: a control without a name"
                value = control.get_attribute("value")
                for key in (Keys.HOME, Keys.END):  # one of the two moves it
                    control.send_keys(key)
                    moved = control.get_attribute("value") != value
                    if moved:
                        break
                assert moved, f"{name}: {control.accessible_name} does not hear the keyboard"
                spoken = control.get_attribute("aria-valuetext")
                assert spoken and spoken in panel.text, f"{name}: {control.accessible_name}"
                assert browser.execute_script(SCREEN, panel), name
        empty = browser.execute_script(
            "return [...document.querySelectorAll('.explore img')]"
            ".filter(i => !i.alt || !i.naturalWidth).length"
        )
        assert not empty, name
        errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors, name


SCREEN = "return arguments[0].querySelector('.explore-screen').innerHTML"
OTHER = """
const c = arguments[0], last = c.tagName === "SELECT" ? c.options.length - 1 : Number(c.max);
c.value = String(Number(c.value) === last ? 0 : last);
c.dispatchEvent(new Event("input", {bubbles: true}));
"""


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, address, pages, mode):
    weak = {}
    for name in names_of(pages):
        open_page(browser, address, name, mode=mode)
        if found := browser.execute_script(CONTRAST):
            weak[name] = found[:5]
    assert not weak


# Every element of the page with text of its own: WCAG 2 contrast with the nearest ground below it.
CONTRAST = r"""
const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
const seen = new Map();
const rgba = (text) => {
  if (!seen.has(text)) {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    seen.set(text, [r, g, b, a / 255]);
  }
  return seen.get(text);
};
const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
const ground = (e) => {
  const layers = [];
  for (let p = e; p; p = p.parentElement) {
    const colour = rgba(getComputedStyle(p).backgroundColor);
    if (colour[3] > 0) layers.push(colour);
    if (colour[3] === 1) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
};
const weak = [], done = new Set();
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!own || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
  if (e.closest("svg, [disabled], script, style, .headerlink, dialog") || !e.offsetParent) continue;
  const style = getComputedStyle(e), below = ground(e), mine = over(rgba(style.color), below);
  const large = parseFloat(style.fontSize) >= 24;
  const [hi, lo] = [light(mine), light(below)].sort((a, b) => b - a);
  const ratio = (hi + 0.05) / (lo + 0.05);
  const what = `${e.tagName}.${e.className} ${style.color} on ${below}: ${ratio.toFixed(2)}`;
  if (ratio < (large ? 3 : 4.5) && !done.has(what)) { done.add(what); weak.push(what); }
}
return weak;
"""


def test_what_has_the_keyboard_is_outlined(browser, address):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    open_page(browser, address, "chapters/scoreboard.html")
    for _ in range(25):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        outline = browser.execute_script(
            "const s = getComputedStyle(document.activeElement);"
            "const html = document.activeElement.outerHTML.slice(0, 120);"
            "return [html, s.outlineStyle, s.outlineWidth]"
        )
        assert outline[1] == "solid" and float(outline[2].removesuffix("px")) >= 2, outline[0]


def kinds_of_pages(pages):
    """A page of each kind: the shortest chapter with a panel, one page for each set of directives,
    and two that Sphinx makes."""
    panels = [name for name in names_of(pages) if pages[name].select(".explore")]
    kinds = {}
    for path in build.toc_pages(ROOT):
        if path.suffix == ".md":
            directives = frozenset(re.findall(r"(?m)^```\{.*?\}", path.read_text(encoding="utf-8")))
            kinds.setdefault(directives, f"chapters/{path.stem}.html")
    sizes = {(ROOT / name).with_suffix(".ipynb").stat().st_size: name for name in panels}
    shortest = [sizes[min(sizes)]] if sizes else []
    return [*shortest, *kinds.values(), "search.html?q=residual", "genindex.html"]


@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_against_wcag_a_and_aa(browser, address, pages, size):
    axe = (ROOT / "tests/axe/axe.min.js").read_text(encoding="utf-8")
    browser.set_script_timeout(120)
    wrong = []
    for name in kinds_of_pages(pages):
        open_page(browser, address, name, size)
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        browser.execute_script(axe)
        for mode in ("light", "dark"):
            found = browser.execute_async_script(AXE, mode)
            wrong += [f"{name}, {mode}: {one}" for one in found]
    assert not wrong, "\n".join(wrong)


# Wide boxes become reachable for the keyboard a moment after a fold opens or the width changes.
AXE = """
const [mode, done] = arguments, root = document.documentElement;
root.dataset.theme = root.dataset.mode = mode;
const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"];
// the other mode changes nothing but colours
const runOnly = mode === "light" ? {type: "tag", values: tags}
  : {type: "rule", values: ["color-contrast", "link-in-text-block"]};
const options = {runOnly, resultTypes: ["violations"], preload: false};
const line = (rule) => `${rule.id} ${rule.nodes.length}x: ${rule.nodes[0].html.slice(0, 200)}`;
dispatchEvent(new Event("resize"));
const wait = mode === "light" ? 400 : 0;
setTimeout(() => axe.run(document, options).then((r) => done(r.violations.map(line))), wait);
"""


@pytest.mark.parametrize("place", ["served", "as a file"])
def test_search_finds_a_chapter_with_no_server_behind_it(browser, address, site, place):
    from selenium.webdriver.support.wait import WebDriverWait

    root = address if place == "served" else site.resolve().as_uri()
    browser.get(f"{root}/search.html?q=induction+head")
    done = "return document.querySelector('#search-summary, .search-summary')?.innerText || ''"
    WebDriverWait(browser, 20).until(lambda _: "found" in browser.execute_script(done))
    links = "return [...document.querySelectorAll('#search-results li a')].map(a => a.href)"
    found = browser.execute_script(links)
    assert any("/chapters/patching.html" in link for link in found), found
    browser.get(next(link for link in found if "/chapters/patching.html" in link))
    assert "patching" in browser.title.lower()


def test_a_reader_follows_a_path_and_returns_to_the_order_of_the_book(browser, address):
    from selenium.webdriver.support.select import Select

    order = "return document.querySelector('.prev-next-footer').checkVisibility()"
    open_page(browser, address, "chapters/sinks.html")
    browser.execute_script("localStorage.removeItem('book-path')")
    open_page(browser, address, "chapters/sinks.html")
    assert browser.execute_script(order) and not path_links(browser)
    Select(browser.find_element("id", "path-choice")).select_by_value("economy")
    assert not browser.execute_script(order)
    [before, *_] = path_links(browser)
    assert before.get_attribute("href").endswith("kernels.html")
    before.click()
    assert browser.current_url.endswith("kernels.html")
    names = [link.get_attribute("href").rpartition("/")[2] for link in path_links(browser)]
    assert names == ["hooks.html", "sinks.html"] and not browser.execute_script(order)
    open_page(browser, address, "chapters/patching.html")  # not on this path
    assert browser.execute_script(order) and not path_links(browser)
    open_page(browser, address, "chapters/paths.html")
    pressed = browser.find_element("css selector", ".path-pick[aria-pressed=true]")
    assert pressed.text == "You follow this path"
    pressed.click()
    assert not browser.find_elements("css selector", ".path-pick[aria-pressed=true]")
    open_page(browser, address, "chapters/kernels.html")
    assert browser.execute_script(order) and not path_links(browser)


def path_links(browser):
    links = browser.find_elements("css selector", ".path-links:not([hidden]) a[rel]")
    return [link for link in links if link.is_displayed()]
