"""The page at `/` of a server: one HTML document, its style and scripts inline, nothing from elsewhere."""

import base64
import hashlib
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_SCRIPTS = ("dom.js", "markdown.js", "wire.js", "images.js", "turn.js", "settings.js", "chat.js")  # as they run


@cache
def page_html() -> str:
    """The document. Whoever sends it sets `csp()` as its Content-Security-Policy."""
    document = _source("index.html").replace("<style></style>", f"<style>{_style()}</style>")
    return document.replace("<script></script>", f"<script>{_script()}</script>")


@cache
def csp() -> str:
    """The policy: its own style and script by their SHA-256 (CSP 3, 2.3.1), pictures at hand, requests to its server.

    `require-trusted-types-for 'script'` with no policy allowed makes a browser refuse to read any text as HTML.
    """
    sources = f"style-src '{_digest(_style())}'; script-src '{_digest(_script())}'; img-src data: blob:"
    nothing = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    typed = "require-trusted-types-for 'script'; trusted-types 'none'"
    return f"default-src 'none'; connect-src 'self'; {sources}; {nothing}; {typed}"


def _style() -> str:
    return _source("style.css")


def _script() -> str:
    """The scripts in one block, so that their names are not the window's."""
    return '"use strict";\n{\n' + "\n".join(map(_source, _SCRIPTS)) + "}\n"


def _source(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """A source of the policy: the text between the tags, hashed."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
