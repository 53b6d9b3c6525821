"""Where the files that are not Python live: sql/, migrations/, dbt_project/.

A wheel carries them under anton/_share; in a checkout they stand beside the package.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def share(name: str) -> Path:
    """The folder `name` ("sql", "migrations", "dbt_project", "template") that came with this Anton.

    Raises FileNotFoundError naming both places when neither has it, which means a broken install.
    """
    places = (_PACKAGE / "_share" / name, _PACKAGE.parent / name)
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(f"{name!r} is in neither {places[0]} nor {places[1]}; reinstall anton-framework")


def version() -> str:
    """Anton's own version."""
    import tomllib
    from importlib import metadata  # 15 ms, and few ask

    try:
        return metadata.version("anton-framework")
    except metadata.PackageNotFoundError:  # a bare checkout
        with (_PACKAGE.parent / "pyproject.toml").open("rb") as file:
            return str(tomllib.load(file)["project"]["version"])
