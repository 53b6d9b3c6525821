"""Template: what `anton new` makes, from template_files/: an app in the shape all apps have."""

from __future__ import annotations

import re
from pathlib import Path

from anton.errors import ConfigError

_FILES = Path(__file__).with_name("template_files")


def make(folder: Path) -> Path:
    """Makes an app in a new or empty folder, named after it; returns the folder.

    Raises ConfigError when the name cannot be an app's, or something is there already.
    """
    name = folder.resolve().name
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", name):
        raise ConfigError(f'"{name}" is no name for an app. Allowed: lower-case letters, digits, - and _, at most 63, '
                          "such as my-bot", name=name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and is not empty; nothing was written", name=name)
    title = re.sub(r"[-_]+", " ", name).capitalize()
    for source in sorted(_FILES.rglob("*.in")):
        target = folder / source.relative_to(_FILES).with_suffix("")
        target = target.with_name(".gitignore") if target.name == "gitignore" else target
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text().replace("__NAME__", name).replace("__TITLE__", title))
    return folder
