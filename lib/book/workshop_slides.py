"""Slides of a session: nbconvert's reveal.js, shipped beside the file; nothing fetched.

One slide for each part of the route, with its first paragraph; under it (arrow down) its figures
and panels as they are stored in the chapter, each with the words before it. Code stays in the
notebooks. Instructor's cells are speaker notes.
"""

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

from lib.book import store
from lib.book.chapter import Chapter, Section, tags
from lib.book.workshop_edition import title
from lib.book.workshop_plan import Plan, clean
from lib.book.workshop_text import Words, plain, with_mathml

# Files of reveal.js in lib/book/reveal/, and where the slides look for them.
FILES = {
    "reveal.js": "dist/reveal.js",
    "reveal.css": "dist/reveal.css",
    "notes.js": "plugin/notes/notes.js",
    "LICENSE": "LICENSE",
}
FOLDER = "reveal.js"
SHOWN = ("image/png", "image/jpeg", "image/svg+xml", "text/html")
LARGEST = 700  # words on a slide, beyond which a part's prose is left to the notebook

# nbconvert's own template fetches jQuery, RequireJS, MathJax and Mermaid; equations are MathML
# here, and reveal.js starts by itself.
TEMPLATE = """{% extends "reveal/index.html.j2" %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_css %}<style>
.reveal { font: 24px/1.4 system-ui, sans-serif; color: #1c1c1c; }
.reveal .slides { text-align: left; }
.reveal .slides section { height: 100%; overflow: auto; padding: 0 8px 24px; }
.reveal h1, .reveal h2, .reveal h3 { line-height: 1.15; margin: .3em 0; color: #00466e; }
.reveal h1 { font-size: 2em; } .reveal h2 { font-size: 1.45em; } .reveal h3 { font-size: 1.15em; }
.reveal table { font-size: .75em; border-collapse: collapse; }
.reveal td, .reveal th { padding: .15em .7em; border-bottom: 1px solid #ccc; text-align: left; }
.reveal img { max-width: 100%; max-height: 500px; display: block; margin: auto; }
.reveal pre, .reveal code { font-size: .85em; }
.reveal .math { overflow-x: auto; text-align: center; margin: .5em 0; }
.reveal a { color: #005b8f; }
.jp-Cell, .jp-OutputArea-child, .jp-Notebook { background: #fff; padding: 0; }
.jp-InputPrompt, .jp-OutputPrompt, .jp-Collapser { display: none; }
.jp-RenderedHTMLCommon { font-size: 1em; }
:root { --jp-content-font-size1: 22px; --jp-ui-font-size1: 20px; }
</style>{% endblock %}
{% block data_png scoped %}
<div class="jp-RenderedImage jp-OutputArea-output"><img
 src="data:image/png;base64,{{ output.data['image/png'] | replace('\\n', '') }}"
 alt="{{ (output | get_metadata('alt', 'image/png') or 'a figure') | escape_html }}"></div>
{% endblock %}
{% block footer_js %}
<script src="FOLDER/dist/reveal.js"></script>
<script src="FOLDER/plugin/notes/notes.js"></script>
<script>
Reveal.initialize({controls: true, progress: true, hash: true, transition: "none",
  slideNumber: "c/t", width: 1080, height: 700, center: false, plugins: [RevealNotes]});
</script>
{% endblock footer_js %}
""".replace("FOLDER", FOLDER)


def html(plan: Plan) -> str:
    """The slides as one HTML file that wants the folder `reveal.js/` beside it."""
    from jinja2 import DictLoader
    from nbconvert import SlidesExporter

    exporter = SlidesExporter(
        extra_loaders=[DictLoader({"workshop.html.j2": TEMPLATE})],
        template_file="workshop.html.j2",
        reveal_url_prefix=FOLDER,
        exclude_input=True,
        exclude_anchor_links=True,
    )
    body, _ = exporter.from_notebook_node(deck(plan), {"metadata": {"name": title(plan.chapter)}})
    # The theme is the style above; nbconvert always links one of reveal.js's, with its fonts.
    lines = body.splitlines(keepends=True)
    return "".join(line for line in lines if f'href="{FOLDER}/dist/theme/' not in line)


def deck(plan: Plan) -> nbformat.NotebookNode:
    """The slides as a notebook whose cells say where a slide begins."""
    chapter, words = plan.chapter, Words(plan.chapter)
    promise = _paragraphs(plain(chapter.cells[0].source, words))
    cells = [_slide(f"# {title(chapter)}\n\n{promise[1] if len(promise) > 1 else ''}")]
    rows = ["| time | part |", "| --- | --- |"]
    rows += [f"| {part.clock} | {part.title} |" for part in plan.parts]
    cells.append(_slide("## This session\n\n" + "\n".join(rows)))
    for part in plan.parts:
        if part.section is not None:
            cells += _section(chapter, part.section, words)
        elif part.exercise is not None:
            one = part.exercise
            text = plain(chapter.cells[one.start].source, words, [one])
            text = text[text.index("### Exercise") :]
            cells.append(_slide("## " + text.removeprefix("### ")))
        else:
            cells.append(_slide(f"## {part.title}\n\n{part.minutes} minutes"))
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = dict(store.KERNEL)
    notebook.metadata["language_info"] = dict(store.LANGUAGE)
    return notebook


def _slide(text: str, kind: str = "slide") -> nbformat.NotebookNode:
    cell = new_markdown_cell(with_mathml(text))
    cell.metadata["slideshow"] = {"slide_type": kind}
    return cell


def _section(chapter: Chapter, section: Section, words: Words) -> list[nbformat.NotebookNode]:
    cells, before, notes, first = [], "", [], True
    for index in range(section.start, section.end):
        cell = chapter.cells[index]
        if "instructor" in tags(cell):
            notes.append(_slide(plain(cell.source, words), "notes"))
        elif cell.cell_type == "markdown" and first:
            lead = _paragraphs(plain(cell.source, words))
            body = [text for text in lead[1:] if len(text.split()) < LARGEST]
            cells.append(_slide("\n\n".join([f"## {clean(section.title)}", *body[:4]])))
            first = False
        elif cell.cell_type == "markdown":
            before = plain(cell.source, words)
        elif cell.cell_type == "code":
            shown = _pictures(cell)
            if shown is not None:
                if before:
                    cells.append(_slide("\n\n".join(_paragraphs(before)[:2]), "subslide"))
                else:
                    shown.metadata["slideshow"] = {"slide_type": "subslide"}
                cells.append(shown)
                before = ""
    return cells[:1] + notes + cells[1:]


def _pictures(cell: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """The figures, tables and panels of a cell, or None where it shows none."""
    outputs = [output for output in cell.outputs if set(SHOWN) & set(output.get("data", {}))]
    if not outputs:
        return None
    made = new_code_cell("", outputs=store.clean_outputs(outputs))
    made.metadata["slideshow"] = {"slide_type": "-"}
    return made


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of plain markdown; fenced code and display mathematics stay whole."""
    found, inside = [""], False
    for line in text.split("\n"):
        if line.lstrip().startswith(("```", "~~~")) or line.strip() == "$$":
            inside = not inside
        if not line.strip() and not inside:
            found.append("")
        else:
            found[-1] += line + "\n"
    return [part.strip("\n") for part in found if part.strip()]
