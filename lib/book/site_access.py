"""Small repairs to what other packages write, for readers who cannot see the page."""

from sphinx.application import Sphinx

REPAIRS = {
    # myst-nb hides the words on a fold behind a name that does not say what is in it
    '<summary aria-label="Toggle hidden content">': "<summary>",
    # docutils' role is deprecated for anything but an item of a list, which it forbids here
    ' role="doc-biblioentry"': ' role="listitem"',
}


def repair(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    """Apply the repairs to the body of a page."""
    for wrong, right in REPAIRS.items():
        context["body"] = context.get("body", "").replace(wrong, right)


def setup(app: Sphinx) -> None:
    """Register the repairs."""
    app.connect("html-page-context", repair)
