"""What helps a reader find the way: paths, glossary, notation, index of figures, report of runs.

The built pages with them are tested in `test_site.py`.
"""

import re

import pytest
import torch
from bs4 import BeautifulSoup

from lib import hooks
from lib.book import build, places, site_execution, site_figures, site_paths, site_terms
from lib.book.site_data import FAMILIES, PATHS

ROOT = places.root()
NOTATION = (ROOT / "chapters/notation.md").read_text(encoding="utf-8")


def html(text):
    return BeautifulSoup(text, "html.parser")


def chapters():
    """Slug → notebook, of the chapters that are pages of the book."""
    pages = [path for path in build.toc_pages(ROOT) if path.suffix == ".ipynb"]
    return {path.stem: places.read_notebook(path) for path in pages}


def prose(notebook):
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return re.sub(r"(?s)(```|~~~).*?\1", "", "\n\n".join(cells))


# ---------------------------------------------------------------- learning paths


def test_three_paths_lead_through_all_families_and_only_to_chapters():
    assert len(PATHS) == 3
    stops = [slug for path in PATHS.values() for slug in path.chapters]
    assert set(FAMILIES) <= set(stops)
    assert set(stops) <= set(FAMILIES) | set(places.slugs(ROOT))
    for path in PATHS.values():
        assert len(set(path.chapters)) == len(path.chapters)


def test_no_chapter_on_a_path_stands_before_what_it_builds_on():
    for slug, notebook in chapters().items():
        needs = notebook.metadata["book"].get("prerequisites", [])
        for path in PATHS.values():
            if slug in path.chapters:
                before = path.chapters[: path.chapters.index(slug)]
                assert [need for need in needs if need not in before] == [], (slug, path.title)


def only(*written):
    return lambda slug: f"{slug}.html" if slug in written else None


def test_previous_and_next_skip_what_is_not_written():
    stops = ("a", "b", "c", "d", "e")
    page = only("a", "c", "e")
    assert site_paths.neighbours(stops, "c", page) == ("a", "e")
    assert site_paths.neighbours(stops, "a", page) == (None, "c")
    assert site_paths.neighbours(stops, "e", page) == ("c", None)


def test_a_path_links_to_what_is_written_and_says_what_is_coming():
    page = html(site_paths.paths_html(only("hooks", "sinks"), str.upper))
    for section, path in zip(page.select(".path"), PATHS.values(), strict=True):
        stops = section.select("ol li")
        assert len(stops) == len(path.chapters)
        for stop, slug in zip(stops, path.chapters, strict=True):
            if slug in ("hooks", "sinks"):
                assert stop.a["href"] == f"{slug}.html" and stop.text == slug.upper()
            else:
                assert not stop.a and stop.text == f"{FAMILIES.get(slug, slug)} coming"


def test_a_chapter_offers_the_paths_it_is_on_and_the_order_of_the_book():
    page = only("hooks", "sinks", "paths")
    nav = html(site_paths.nav_html("sinks", page, str.upper))
    mine = [key for key, path in PATHS.items() if "sinks" in path.chapters]
    assert [option["value"] for option in nav.select("option")] == ["", *mine]
    assert [links["data-path"] for links in nav.select(".path-links")] == mine
    assert nav.select_one("a[rel=prev]")["href"] == "hooks.html"
    assert not nav.select("a[rel=next]") and "are coming" in nav.text
    assert site_paths.nav_html("scoreboard", page, str.upper) == ""


# ---------------------------------------------------------------- the execution report


def row(title="One", stale=(), **facts):
    return site_execution.Row(title, "one.html", facts, list(stale))


def test_the_report_says_cost_date_versions_and_why_outputs_are_stale():
    runs = {"smoke": {"seconds": 9.6, "peak_gib": 1.26}, "default": {"seconds": 61, "peak_gib": 2}}
    last = {"date": "2026-01-02", "versions": {"torch": "2.13", "python": "3.12"}}
    fresh = row(measured=runs, last_run=last)
    old = row("Two <b>", ["code", "lib/hooks.py"], last_run={"versions": {"torch": "2.12"}})
    page = html(site_execution.execution_html([fresh, old]))
    one, two = page.select("tbody tr")
    cells = ["✓ fresh", "2026-01-02", "10 s, 1.3 GiB", "61 s, 2.0 GiB", "not measured"]
    assert [cell.text for cell in one.select("td")] == cells
    assert two.th.text == "Two <b>" and two.td.text == "✗ stale code, lib/hooks.py"
    assert [page.select_one(f"#n-{n}").text for n in ("chapters", "fresh")] == ["2", "1"]
    versions = [part.text.replace("\xa0", " ") for part in page.select(".versions")]
    assert versions == ["One: python 3.12, torch 2.13.", "Two <b>: torch 2.12."]


def test_chapters_that_ran_with_the_same_versions_share_a_line():
    same = {"versions": {"torch": "2.13"}}
    page = html(site_execution.execution_html([row(last_run=same), row("Two", last_run=same)]))
    assert [part.b.text for part in page.select(".versions")] == ["All chapters"]


# ---------------------------------------------------------------- the index of figures


def test_the_index_links_each_figure_with_its_words_and_picture():
    figures = [
        site_figures.Figure("figure-1", "A & B", "Rises <fast>.", "images/1.png"),
        site_figures.Figure("explore-1", "Explore", "At rest.", "data:image/png;base64,xx"),
        site_figures.Figure("idea", "Idea", "A box.", '<svg role="img" aria-label="A box."></svg>'),
    ]
    source = {"images/1.png": "../_images/1.png"}
    shown = [("One", "one.html", figures), ("No figures", "two.html", [])]
    page = html(site_figures.figures_html(shown, lambda uri: source.get(uri, uri)))
    assert [head.text for head in page.select("h2")] == ["One"]
    links = [link["href"] for link in page.select("li a")]
    assert links == ["one.html#figure-1", "one.html#explore-1", "one.html#idea"]
    assert [words.text for words in page.select("li p")] == ["Rises <fast>.", "At rest.", "A box."]
    assert [i["src"] for i in page.select("img")] == ["../_images/1.png", figures[1].picture]
    assert page.svg["aria-hidden"] == "true" and "aria-label" not in page.svg.attrs


# ---------------------------------------------------------------- the glossary


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Attention\nsinks and a latent", ["attention sink", "latent"]),
        ("two dictionaries", ["dictionary"]),
        ("activation patching", ["activation patching"]),
        ("tokenizer, sub-token, on-site", []),
        ("tokens.", ["token"]),
    ],
)
def test_terms_are_found_whole_in_the_plural_and_the_longest_first(text, found):
    words = ["token", "site", "latent", "dictionary", "patching", "activation patching"]
    words.append("attention sink")
    ordered = sorted(words, key=len, reverse=True)
    matches = site_terms.pattern(words).finditer(text)
    assert [ordered[match.lastindex - 1] for match in matches] == found


def test_words_that_are_never_linked_are_in_the_glossary():
    glossary = re.findall(r"(?m)^(\w.*)\n  ", NOTATION.partition("```{glossary}")[2])
    assert len(glossary) > 10 and site_terms.EVERYDAY < set(glossary)


# ---------------------------------------------------------------- the page of notation


def small_models():
    """A language model, U-Net, diffusion transformer and plain net: all kinds of sites."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel
    from transformers import LlamaConfig, LlamaForCausalLM

    yield LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=1)
    )  # fmt: skip
    yield UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
    )  # fmt: skip
    yield SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
    )
    yield torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Conv2d(1, 1, 1)]))


@pytest.fixture(scope="module")
def kinds():
    """Names of all sites that the library knows, without their numbers."""
    return {re.sub(r"\.\d+$", "", site) for one in small_models() for site in hooks.sites(one)}


def on_the_page():
    """Names of sites in the page's tables, without their numbers."""
    cells = re.findall(r"(?m)^\| (`[^|]*)\|", NOTATION)
    return {
        re.sub(r"\.[iℓ]$", "", name) for cell in cells for name in re.findall(r"`([^`]+)`", cell)
    }


def test_every_site_of_the_library_is_on_the_page_and_no_other(kinds):
    page = on_the_page()
    assert kinds - page == set(), "sites that chapters/notation.md does not have"
    assert page - kinds == set(), "sites that the library does not have"


def test_every_site_that_chapters_name_in_prose_is_on_the_page():
    # every name of a site ends like one of these; what code names exists, or it would not run
    like = re.compile(
        r"[`\"']((?:\w+_)?(?:resid_\w+|attn_\w+|mlp_\w+|pattern|scores|z|out|norm|block|logits))"
        r"\.(?:\d+|\{\w+\}|ℓ)"
    )
    named = {}
    for slug, notebook in chapters().items():
        named |= {name: slug for name in like.findall(prose(notebook))}
    assert {"resid_post", "pattern"} <= set(named)
    missing = {name: slug for name, slug in named.items() if name not in on_the_page()}
    assert not missing, f"on no table of chapters/notation.md: {missing}"


MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\s](?:[^$]*?[^$\s])?)\$", re.DOTALL)
WORDS = re.compile(r"\\(?:text|mathrm|operatorname\*?|mathbb|textstyle|begin|end)\s*\{[^}]*\}")
# Signs of layout and arithmetic, which every reader of equations knows.
KNOWN = set(
    r"""\qquad \quad \frac \tfrac \dfrac \cdot \times \sum \prod \max \min \log \exp \sqrt \top
    \left \right \big \Big \bigl \bigr \dots \ldots \cdots \le \ge \leq \geq \ne \neq \approx \sim
    \in \to \text \mathrm \mathbf \mathbb \mathcal \operatorname \end \lvert \rvert \rVert \begin
    \pm \ln \cos \arg \infty \textstyle \overline \tilde \prime \langle \rangle \ll \gg \propto
    \argmax \argmin \softmax \circ \substack \underbrace \overbrace \cup \cap \subset \subseteq
    \setminus \forall \exists \mapsto \Rightarrow \rightarrow \equiv \displaystyle""".split()
)


def symbols(text):
    """Letters and named signs in the equations of a text, without words and known signs."""
    found = set()
    for block, inline in MATH.findall(text):
        found |= set(re.findall(r"\\[a-zA-Z]+|[A-Za-z]", WORDS.sub(" ", block or inline)))
    return found - KNOWN


def test_symbols_are_read_from_equations():
    text = r"It costs $5. $x_\text{clean}$, $\lambda$" + "\n\n" + r"$$\frac{a}{\mathrm{rms}(b)}$$"
    assert symbols(text.replace("$5", "5")) == {"x", "\\lambda", "a", "b"}


def test_every_symbol_that_two_chapters_share_is_on_the_page():
    users = {}
    for slug, notebook in chapters().items():
        for symbol in symbols(prose(notebook)):
            users.setdefault(symbol, []).append(slug)
    shared = {symbol: slugs for symbol, slugs in users.items() if len(slugs) > 1}
    assert len(shared) > 10
    missing = {symbol: shared[symbol] for symbol in set(shared) - symbols(NOTATION)}
    assert not missing, f"in no table of chapters/notation.md: {missing}"
