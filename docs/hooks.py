"""mkdocs: pages that stand outside docs/, and links as they are right in the repository turned into links between pages."""

import posixpath
import re

from mkdocs.structure.files import File

OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    **{
        f"comp_kernels/ops/{name}/README.md": f"operators/{name}.md"
        for name in ("rope_attention", "sinkhorn", "alignment_loss")
    },
}
"""Page by file of the repository."""
FILES = {page: file for file, page in OUTSIDE.items()}


def on_files(files, *, config):
    for file, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=file))


def on_page_markdown(markdown, *, page, **_):
    here = page.file.src_uri
    file = FILES.get(here, f"docs/{here}")

    def link(match):
        if match[1] is None:  # code
            return match[0]
        path, _, anchor = match[1].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        target = OUTSIDE.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{'#' + anchor if anchor else ''})"

    return re.sub(r"```.*?```|`[^`]*`|\]\((?!https?:|#)([^)\s]+)\)", link, markdown, flags=re.DOTALL)
