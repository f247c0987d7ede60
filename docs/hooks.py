"""Hooks of MkDocs: docstrings, formulas without scripts, and pages and files from elsewhere in the repository."""

import os
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

from lsgd_jax.cli import help

DOCS = Path(__file__).parent
ROOT = DOCS.parent
ELSEWHERE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/**/*.md")
"""Further pages of the site."""
OPTIONS = "<!-- options in groups -->"
"""In whose place the tables of the configuration's fields stand."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let docstrings have formulas and doctests."""
    config.markdown_extensions.append(_Docstrings())  # type: ignore[arg-type]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere, and the notebooks as pages."""
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, _uri(path), abs_src_path=str(path)))
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        text, resources = MarkdownExporter().from_filename(path, resources={"unique_key": path.stem})
        files.append(File.generated(config, _uri(path), content=text))
        for name, picture in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show options in groups; let links to the repository's other files lead to copies, those to folders be text."""
    if OPTIONS in markdown:
        markdown = markdown.replace(OPTIONS, help.tables())
    here = Path(page.file.src_uri).parent
    folder = Path(page.file.abs_src_path).parent if page.file.abs_src_path else ROOT / here  # That of the notebooks.

    def led(link: re.Match) -> str:
        path = (folder / link["path"]).resolve()
        if path.is_dir():
            return link["text"][1:-1]
        if not path.is_file() or not path.is_relative_to(ROOT):
            return link[0]  # For MkDocs to complain.
        uri = _uri(path)
        if files.get_file_from_path(uri) is None and path.suffix != ".md":
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        return f"{link['text']}({os.path.relpath(uri, here)}{link['anchor'] or ''})"

    return re.sub(r"(?P<text>\[[^\[\]]*\])\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)", led, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write formulas in MathML, which browsers show by themselves."""
    html = re.sub(r'<span class="arithmatex">\\\((.+?)\\\)</span>', _mathml("inline"), html, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>', _mathml("block"), html, flags=re.DOTALL)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Load the shim with which the search works from the folder out of the site itself."""
    return _with_own_shim(output, os.path.relpath("iframe-worker.js", Path(page.file.dest_uri).parent))


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    """As `on_post_page`."""
    return _with_own_shim(output, "iframe-worker.js")


def _with_own_shim(html: str, path: str) -> str:
    return html.replace("https://unpkg.com/iframe-worker/shim", path)


def _uri(path: Path) -> str:
    """Where a file of the repository lies in the site: as it does there, but for the folder docs/."""
    of = path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT)
    return (of.with_suffix(".md") if of.suffix == ".ipynb" else of).as_posix()


def _mathml(display: str) -> Callable[[re.Match], str]:
    return lambda formula: convert(unescape(formula[1]).strip(), display=display)


class _Docstrings(Extension):
    """What docstrings have beside Markdown: formulas as Sphinx writes them, and doctests."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - the name is Markdown's.
        md.preprocessors.register(_Doctests(md), "doctests", 27)
        md.preprocessors.register(_Formulas(md), "formulas", 15)  # Fenced code is put aside in between, at 25.


class _Doctests(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return re.sub(r"^>>> .*(\n.+)*", r"```pycon\n\g<0>\n```", "\n".join(lines), flags=re.MULTILINE).split("\n")


class _Formulas(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        text = re.sub(r":math:`([^`]+)`", r"\\(\1\\)", "\n".join(lines))
        text = re.sub(r"^\.\. math:: (.+(?:\n +\S.*)*)", r"\\[\n\1\n\\]", text, flags=re.MULTILINE)
        return text.split("\n")
