"""A hook of mkdocs: pages that stand outside docs/ join the site, and links between them keep leading somewhere.

The pages are written for whoever reads the repository, where README.md is the first and links are paths in it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Path in the repository: page of the site.
JOINED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    """Adds the pages of JOINED."""
    for source, page in JOINED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites links from paths of the repository to pages of the site; what is no page becomes its text."""
    site = page.file.src_uri
    source = next((path for path, name in JOINED.items() if name == site), f"docs/{site}")

    def rewritten(found: re.Match) -> str:
        picture, text, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        name = JOINED.get(place, place.removeprefix("docs/") if place.startswith("docs/") else None)
        if name is None:
            if not (ROOT / place).exists():
                raise ValueError(f"{source}: {target} leads nowhere")
            return text
        relative = posixpath.relpath(name, posixpath.dirname(site) or ".")
        return f"{picture}[{text}]({relative}{'#' * bool(anchor)}{anchor})"

    return _LINK.sub(rewritten, markdown)
