"""Pages of the documentation site that do not lie in docs/: a hook that mkdocs.yml names.

Every page keeps the path that its file has in the repository, so links between READMEs and guides need no change.
"""

import importlib
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "core", "ckpt", "infer", "eval")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the guides under docs/, and add the READMEs, the changelogs and one API page for each package."""
    for file in files.documentation_pages() + files.media_files():
        if file.abs_src_path and Path(file.abs_src_path).is_relative_to(ROOT / "docs"):
            files.remove(file)
    for path in [*repository_pages(), *sorted(path for path in (ROOT / "docs").rglob("*") if path.is_file())]:
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for name in PACKAGES:
        module = f"ascendspeed_{name}"
        files.append(File.generated(config, f"api/{module}.md", content=api_page(module)))
    return files


def repository_pages() -> list[Path]:
    """Documents outside docs/ that the site shows."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    for name in PACKAGES:
        folder = ROOT / "packages" / f"ascendspeed-{name}"
        pages += [folder / "README.md", folder / "CHANGELOG.md"]
    return pages


def api_page(module: str) -> str:
    """The Markdown of a package's API page: every name that the package exports at its top level."""
    lines = [
        f"# {module}",
        "",
        f"::: {module}",
        "    options:",
        "      show_root_heading: false",
        "      members:",
    ]
    return "\n".join([*lines, *(f"        - {name}" for name in exports(module))]) + "\n"


def exports(module: str) -> list[str]:
    """The names in `__all__` of a package; importing the package alone needs nothing but Python."""
    sys.path.insert(0, str(ROOT / "packages" / module.replace("_", "-") / "src"))
    try:
        return list(importlib.import_module(module).__all__)
    finally:
        del sys.path[0]
