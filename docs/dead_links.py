"""A hook of MkDocs that puts a dead link into a page and into a notebook: `make docs` sees them fail the build."""

from mkdocs.structure.pages import Page


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Add the link."""
    planted = page.file.src_uri in ("faq.md", "notebooks/quickstart.md")
    return f"{markdown}\n\n[dead](dead.md)\n" if planted else markdown
