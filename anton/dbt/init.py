"""Init: what `anton dbt init` writes into a dbt project: Anton's macros, and two lines for each kind of node.

With them each build fires events, whoever runs dbt. Without, only builds through Anton do: it adds them in memory.
"""

from __future__ import annotations

import re
from pathlib import Path

from anton.errors import ConfigError
from anton.share import share

FILE = "dbt_project.yml"
KINDS = ("models", "seeds", "snapshots")
HOOKS = (("pre-hook", "{{ anton_before() }}"), ("post-hook", "{{ anton_after() }}"))

NEW = """name: {name}
version: "1.0"
config-version: 2
profile: anton                # `anton dbt` makes it from Anton's own database; for plain dbt: profiles.yml
"""
EXAMPLE = """-- A table that `anton dbt build` makes. In main.py: seen = DbtProject("{folder}").model("example")
{{{{ config(materialized="table") }}}}
select 1 as id, 'hello' as greeting
"""
SCHEMA = """version: 2
models:
  - name: example
    columns:
      - name: id              # these two tests make it the key, by which records are compared
        data_tests: [unique, not_null]
"""


def init(folder: Path) -> list[str]:
    """Brings a project up to date, or makes one; what was done, nothing when all was there. Comments stay."""
    done = [] if (folder / FILE).exists() else _make(folder)
    text = (folder / FILE).read_text()
    target = folder / macro_folder(text)
    for source in sorted((share("dbt_project") / "macros").glob("*.sql")):
        file = target / source.name
        if not file.exists() or file.read_text() != source.read_text():
            target.mkdir(parents=True, exist_ok=True)
            done.append(f"{file.relative_to(folder)}: {'brought up to date' if file.exists() else 'written'}")
            file.write_text(source.read_text())
    hooked = with_hooks(text)
    if hooked != text:
        (folder / FILE).write_text(hooked)
        done.append(f"{FILE}: two lines under each of {', '.join(KINDS)}")
    return done


def stamp(folder: Path) -> tuple[int | None, int]:
    """The version of Anton's macros in a project, None when it has none, and the one that came with this Anton."""
    came = _version(share("dbt_project") / "macros" / "anton.sql")
    assert came is not None
    try:
        return _version(folder / macro_folder((folder / FILE).read_text()) / "anton.sql"), came
    except OSError:
        return None, came


def hooks_missing(text: str) -> list[str]:
    """The kinds of what dbt builds whose section of dbt_project.yml lacks a hook of Anton's."""
    return [kind for kind in KINDS if not all(call.strip("{} ") in _section(text, kind)[0] for _, call in HOOKS)]


def macro_folder(text: str) -> str:
    """Where a project keeps macros that are not its own."""
    found = re.search(r"^macro-paths\s*:\s*\[?\s*\n?\s*-?\s*[\"']?([^\"'\],\s]+)", text, re.MULTILINE)
    return f"{found[1] if found else 'macros'}/anton"


def with_hooks(text: str) -> str:
    """dbt_project.yml with Anton's hooks. Raises ConfigError where it has hooks of its own that it cannot add to."""
    for kind in hooks_missing(text):
        body, start, end = _section(text, kind)
        if start < 0:
            text = text.rstrip("\n") + f"\n\n{kind}:\n" + _lines("  ", HOOKS)
            continue
        head, _, rest = body.partition("\n")
        given = re.sub(r"#.*", "", head.partition(":")[2]).strip()
        if given in ("{}", "null", "~"):
            head, given = head.replace(given, "", 1).rstrip(), ""
        if given:
            raise ConfigError(f"{FILE}: write {kind}: as a block, one key a line, then run anton dbt init again")
        indent = (re.search(r"^( +)(?=[^\s#])", rest, re.MULTILINE) or ["", "  "])[1]
        own = [name for name, call in HOOKS if call.strip("{} ") not in rest
               and re.search(rf"^{indent}[\"']?\+?{name}", rest, re.MULTILINE)]
        if own:
            wanted = "; ".join(f'to {name}: "{call}"' for name, call in HOOKS if name in own)
            raise ConfigError(f"{FILE}: {kind}: has a {own[0]} of its own. Make it a list and add {wanted}")
        missing = [(name, call) for name, call in HOOKS if call.strip("{} ") not in rest]
        text = text[:start] + head + "\n" + _lines(indent, missing) + rest + text[end:]
    return text


def _lines(indent: str, hooks: object) -> str:
    return "".join(f'{indent}+{name}: "{call}"\n' for name, call in hooks)  # type: ignore[attr-defined]


def _section(text: str, kind: str) -> tuple[str, int, int]:
    """A top-level key with all below it, and where it stands; "", -1 when there is none."""
    found = re.search(rf"^{kind}\s*:.*(?:\n(?:[ \t]+.*|#.*|[ \t]*))*\n?", text, re.MULTILINE)
    return (found[0], found.start(), found.end()) if found else ("", -1, -1)


def _version(file: Path) -> int | None:
    try:
        found = re.search(r"version (\d+)", file.read_text())
    except OSError:
        return None
    return int(found[1]) if found else 0


def _make(folder: Path) -> list[str]:
    (folder / "models").mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", folder.resolve().name).strip("_").lower() or "shop"
    (folder / FILE).write_text(NEW.format(name=name if name[:1].isalpha() else f"dbt_{name}"))
    (folder / "models" / "example.sql").write_text(EXAMPLE.format(folder=folder.name))
    (folder / "models" / "schema.yml").write_text(SCHEMA)
    (folder / ".gitignore").write_text("target/\nlogs/\ndbt_packages/\n")
    return [f"{folder}: a new project, with one model"]
