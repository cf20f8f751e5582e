"""Bring the repository into the site: README, results, notebooks, sources, and the API reference.

The documents link to files of the repository, as a reader of the repository needs it. Here each such link is
turned into one to the page that shows the file. `python docs/hooks.py` prints the list of files.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minilora"
PAGES = {  # file of the repository: page of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
KERNELS = "minilora/kernels/README.md"
NO_REFERENCE = ("kernels", "cli", "labs", "__main__")  # not called by users of the library
SOURCE = """---
search: {{exclude: true}}
hide: [toc]
---
# {name}

````python linenums="1"
{source}````
"""
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def modules() -> list[Path]:
    """Return all modules of the package: those of the top level first, then package by package."""
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    return sorted(paths, key=lambda path: (len(path.parts) > 1, path.parent.parts, path.name))


def caption(path: Path) -> str:
    """Return the first paragraph of a module's docstring in one line, without its period."""
    text = ast.get_docstring(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")


def tree() -> str:
    """Return the list of files in Markdown, each linked to its source: a table for each folder."""
    lines: list[str] = []
    folder: Path | None = None
    for path in modules():
        if path.parent != folder:
            folder = path.parent
            name = "minilora/" if folder == Path() else f"minilora/{folder.as_posix()}/"
            lines += ["", f"## {name}", ""]
            about = caption(folder / "__init__.py")
            lines += [f"{about}.", "", "| file | what it is |", "|---|---|"]
        if path.name != "__init__.py":
            lines.append(
                f"| [{path.name}](../minilora/{path.as_posix()}) | {caption(path).replace('|', '¦')} |"
            )
    return "\n".join(lines)


def mounted() -> dict[str, str]:
    """Return every file of the repository that the site shows, and the page that shows it."""
    found = dict(PAGES)
    found |= {f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")}
    found |= {f"docs/images/{path.name}": f"images/{path.name}" for path in (ROOT / "docs/images").iterdir()}
    found |= {
        f"minilora/{path.as_posix()}": f"source/{path.with_suffix('.md').as_posix()}" for path in modules()
    }
    found[KERNELS] = "kernels.md"
    found["docs/own_adapters.py"] = "adapter.md"
    others = [ROOT / "LICENSE", ROOT / "CITATION.cff", *(ROOT / "notebooks").rglob("*.ipynb")]
    others += [path for path in (ROOT / "benchmarks/results").rglob("*") if path.is_file()]
    return found | {name: name for name in (path.relative_to(ROOT).as_posix() for path in others)}


def relink(text: str, source: str, page: str) -> str:
    """Turn links between files of the repository, as seen from `source`, into links from `page`."""
    known = mounted()

    def change(match: re.Match[str]) -> str:
        target = match[2]
        if ":" in target:
            return match[0]
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if (ROOT / name).is_dir():  # a folder is shown by its README, or by the list of files
            name = f"{name}/README.md" if f"{name}/README.md" in known else "docs/files.md"
        if name not in known:
            return match[0]
        link = posixpath.relpath(known[name], posixpath.dirname(page) or ".")
        return f"{match[1]}{link}{match[3] or ''}{match[4]}"

    return LINK.sub(change, text)


def reference() -> dict[str, str]:
    """Return the pages of the API reference: one for each module at the top and one for each package."""
    pages: dict[str, str] = {}
    for path in modules():
        name = path.parts[0].removesuffix(".py")
        if name in NO_REFERENCE or name == "__init__":
            continue
        module = ".".join(["minilora", *path.with_suffix("").parts])
        if len(path.parts) == 1:
            pages[name] = f"::: {module}\n    options:\n      heading_level: 1\n"
        elif path.name == "__init__.py":
            pages[name] = f"# minilora.{name}\n\n{caption(path)}.\n"
        else:
            pages[name] += f"\n::: {module}\n"
    return pages


def names() -> str:
    """Return the table of what `import minilora` offers, each name linked to its description."""
    found = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    exports = ast.literal_eval(re.search(r"^_EXPORTS = (\{.*?^\})", found, re.M | re.S)[1])  # type: ignore[index]
    lines = [
        "# API reference",
        "",
        "After `import minilora` these names are there, each loaded at its first use.",
        "",
    ]
    lines += ["| name | module |", "|---|---|"]
    for name, module in sorted(exports.items(), key=lambda item: (item[1], item[0])):
        top = module.split(".")[0]
        shown = f"`{name}`" if top in NO_REFERENCE else f"[`{name}`]({top}.md)"
        lines.append(f"| {shown} | `minilora.{module}` |")
    lines.append("| [`memory`](memory.md) | `minilora.memory` |")
    return "\n".join(lines)


def on_config(config: Any) -> Any:
    """Add the reference to the navigation."""
    pages = sorted(reference(), key=lambda name: ((PACKAGE / name).is_dir(), name))
    listed = [{"Names at the top": "reference/index.md"}, *({name: f"reference/{name}.md"} for name in pages)]
    config.nav = [*config.nav, {"API reference": listed}]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that the repository has elsewhere, and those that are made here."""
    from mkdocs.structure.files import File

    def add(page: str, **content: Any) -> None:
        files.append(File.generated(config, page, **content))

    for name, page in mounted().items():
        text = None
        if name in PAGES or (name.endswith(".md") and name.startswith("benchmarks/")):
            text = relink((ROOT / name).read_text(encoding="utf-8"), name, page)
        elif name.startswith("minilora/") and name.endswith(".py"):
            source = (ROOT / name).read_text(encoding="utf-8")
            text = SOURCE.format(name=name, source=source)
        elif name.startswith(("benchmarks/", "notebooks/", "LICENSE", "CITATION")):
            add(page, abs_src_path=str(ROOT / name))
        if text is not None:
            add(page, content=text)
    for name, text in reference().items():
        add(f"reference/{name}.md", content=text)
    add("reference/index.md", content=names())
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is generated, and turn links to files into links to pages."""
    name = page.file.src_uri
    if page.file.generated_by is not None:  # links were turned when the page was made
        return markdown
    if name == "files.md":
        markdown = markdown.replace("<!-- files -->", tree())
    markdown = relink(markdown, f"docs/{name}", name)
    if name == "adapter.md":
        code = (ROOT / "docs/own_adapters.py").read_text(encoding="utf-8")
        markdown = markdown.replace("<!-- examples -->", f"````python\n{code}````")
    if name == "kernels.md" and (ROOT / KERNELS).is_file():
        text = (ROOT / KERNELS).read_text(encoding="utf-8")
        markdown = markdown.replace("<!-- kernels -->", relink(re.sub(r"\A# .*\n", "", text), KERNELS, name))
    return markdown


if __name__ == "__main__":
    print(tree())
