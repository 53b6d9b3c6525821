"""The docs name what there is: every verb, every public name, every command."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

import anton
from anton import errors, sqlfile
from anton.cli import parser
from anton.config import Settings

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").rglob("*.md"))]


def text(*pages: Path) -> str:
    return "\n".join(page.read_text() for page in pages)


def verbs(of: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def sections() -> dict[str, str]:
    """docs/cli.md by its "### anton VERB" headings."""
    parts = re.split(r"^### anton (\w+)$", text(REPO / "docs" / "cli.md"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_verb_has_its_section_and_every_section_its_verb() -> None:
    assert set(sections()) == set(verbs(parser()))


@pytest.mark.parametrize("noun", sorted(verbs(parser())))
def test_a_section_names_its_verbs_and_options(noun: str) -> None:
    section = sections()[noun]
    command = verbs(parser())[noun]
    inner = verbs(command)
    for verb in inner:
        assert re.search(rf"\b{verb}\b", section), f"docs/cli.md does not say: anton {noun} {verb}"
    options = {word for made in (command, *inner.values()) for action in made._actions
               for word in action.option_strings if word.startswith("--")}
    for option in options - {"--help", "--database", "--app", "--json"}:
        assert option in section, f"docs/cli.md does not say: anton {noun} {option}"


def test_every_verb_has_help() -> None:
    for name, command in verbs(parser()).items():
        for each in (command, *verbs(command).values()):
            assert each.description, f"anton {name} has no help"


@pytest.mark.parametrize("name", anton.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert re.search(rf"\b{name}\b", text(*PAGES)), f"no page names {name}"


def test_public_names_are_sorted_and_there() -> None:
    assert anton.__all__ == sorted(anton.__all__)
    assert all(hasattr(anton, name) for name in anton.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_commands_on_a_page_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", text(REPO / "Makefile"), flags=re.M))
    known = set(verbs(parser()))
    for block in re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", text(page), flags=re.S):
        for line in "\n".join(block).splitlines():
            words = line.split("#")[0].split()
            if words[:1] == ["make"] and len(words) > 1:
                assert words[1] in targets, line
            if words[:1] == ["anton"] and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
                assert words[1] in known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text(page), flags=re.S)):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor and other.suffix == ".md":
            heads = [re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-")
                     for head in re.findall(r"^#+ (.*)$", text(other), flags=re.M)]
            assert anchor in heads, f"{page.name}: {target}"


def test_the_table_of_errors_has_every_class_and_every_sqlstate() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (?:`(NT\d+)`)? ?\|", text(REPO / "docs" / "errors.md"), flags=re.M))
    classes = {name: found for name, found in vars(errors).items()
               if isinstance(found, type) and issubclass(found, errors.AntonError) and found is not errors.AntonError}
    assert rows == {name: found.__dict__.get("sqlstate") or "" for name, found in classes.items()}
    raised = set(re.findall(r"errcode = '(NT\d+)'", text(*(REPO / "sql").glob("*.sql"))))
    assert raised <= set(rows.values()) and raised >= set(errors.SQLSTATES) - {"NT000"}


def test_every_key_of_autonomous_json_is_documented() -> None:
    page = text(REPO / "docs" / "configuration.md")
    for name, field in Settings.model_fields.items():
        if name != "schema_url":
            assert f"`{field.alias or name}" in page, name


def test_every_key_of_a_header_of_sql_is_documented() -> None:
    page = text(REPO / "docs" / "sql-steps.md")
    for kind, keys in (("handler", sqlfile._HANDLER), ("schedule", sqlfile._SCHEDULE), ("model", sqlfile._MODEL)):
        (row,) = re.findall(rf"^\| a {kind} \| (.*)\|$", page, re.M)
        assert {key for key in keys if f"`{key}`" not in row} == set(), kind


def test_no_page_holds_a_path_of_a_machine_or_a_secret() -> None:
    for page in PAGES:
        assert not re.search(r"/(root|home/\w+)/|sk-[A-Za-z0-9]{20}|xox[bp]-\d", page.read_text()), page.name
