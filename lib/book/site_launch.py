"""Buttons that open a chapter in Binder or Colab, once `_config.yml` says where the book lives.

The theme makes them from `repository_url`. Without an address it would stop the build or show
buttons that lead nowhere, so they are taken out until there is one.
"""

import re

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError

# Colab opens notebooks of GitHub alone, so the other hosts' addresses would lack a button.
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")


def launch(options: dict) -> dict:
    """The theme's options with launch buttons, or without them where `repository_url` is empty.

    Raises ConfigError for an address that the buttons cannot use.
    """
    address = (options.get("repository_url") or "").strip().rstrip("/").removesuffix(".git")
    if not address:
        return {name: options[name] for name in options if name not in BUTTONS}
    if not ADDRESS.fullmatch(address):
        raise ConfigError(
            f"repository_url in _config.yml is {address!r}; it is empty (no launch buttons) or"
            " https://github.com/OWNER/NAME"
        )
    return {**options, "repository_url": address}


BUTTONS = ("repository_url", "launch_buttons")


def set_launch(app: Sphinx, config: Config) -> None:
    """Before the theme reads its options."""
    config.html_theme_options = launch(config.html_theme_options)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("config-inited", set_launch, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
