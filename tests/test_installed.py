"""Installed: what there is to wire, its pages, and what every component keeps to."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anton_components.vendor.anthropic.cognition import AnthropicCompletion
from anton_components.vendor.fake.cognition import FakeModel
from anton_components.vendor.github.action import GitHubComment, GitHubIssue, GitHubLabel
from anton_components.vendor.http.action import HttpRequest
from anton_components.vendor.http.webhook import SendWebhook
from anton_components.vendor.openai.cognition import OpenAiCompletion
from anton_components.vendor.openai.embedding import OpenAiEmbedding
from anton_components.vendor.openai.tuning import OpenAiFineTune
from anton_components.vendor.postgres.action import PostgresWrite
from anton_components.vendor.rss.poll import Rss
from anton_components.vendor.s3.action import S3Put
from anton_components.vendor.slack.action import SlackPostMessage, SlackReact, SlackReply, SlackUpdateMessage
from anton_components.vendor.slack.approval import SlackAskApproval
from anton_components.vendor.smtp.action import SendEmail
from pydantic import BaseModel

from anton import Table, poll, sql
from anton.app import App, declaring
from anton.cli import main
from anton.component import Component
from anton.errors import MigrationError, Miswired
from anton.installed import Installed, installed, options_of, page
from anton.outbox import ActionComponent

pytestmark = pytest.mark.once("the app's own process: the server is asked for the same")

REPO = Path(__file__).parent.parent
PAGES = REPO / "docs" / "components"
SECRET = "sk-never-to-be-seen"

MADE: dict[str, Callable[[Table[Any]], Component]] = {                 # one of each, with its secret
    "AnthropicCompletion": lambda table: AnthropicCompletion(table, api_key=SECRET),
    "FakeModel": lambda table: FakeModel(table),
    "GitHubComment": lambda table: GitHubComment("acme/shop", token=SECRET, into=table),
    "GitHubIssue": lambda table: GitHubIssue("acme/shop", token=SECRET, into=table),
    "GitHubLabel": lambda table: GitHubLabel("acme/shop", ["bug"], token=SECRET, into=table),
    "HttpRequest": lambda table: HttpRequest("https://example.com/{order}", secret=SECRET, into=table),
    "OpenAiCompletion": lambda table: OpenAiCompletion(table, api_key=SECRET),
    "OpenAiEmbedding": lambda table: OpenAiEmbedding(table, api_key=SECRET),
    "OpenAiFineTune": lambda table: OpenAiFineTune("replies", api_key=SECRET, examples=sql("select * from made")),
    "PostgresWrite": lambda table: PostgresWrite(f"postgresql://ann:{SECRET}@x/y", "t", {"id": "{order}"}, into=table),
    "Rss": lambda table: Rss(table, "https://example.com/feed", headers={"Authorization": SECRET}),
    "S3Put": lambda table: S3Put("shop", access_key="AK", secret_key=SECRET, key="{order}", into=table),
    "SendEmail": lambda table: SendEmail("x", sender="a@b.example", username="ann", password=SECRET, into=table),
    "SendWebhook": lambda table: SendWebhook(secret=SECRET, into=table),
    "SlackAskApproval": lambda table: SlackAskApproval(oauth_token=SECRET),
    "SlackPostMessage": lambda table: SlackPostMessage(oauth_token=SECRET, into=table),
    "SlackReact": lambda table: SlackReact(oauth_token=SECRET),
    "SlackReply": lambda table: SlackReply(oauth_token=SECRET, into=table),
    "SlackUpdateMessage": lambda table: SlackUpdateMessage(oauth_token=SECRET),
}
# Why no field of a record can be missing. Checked: their inputs() are empty, all others' are not.
READS_NOTHING = {
    "OpenAiFineTune": "bound to its own Table",
    "Rss": "polled: no records",
    "SlackAskApproval": "of Notices alone",
    "SlackReact": "reads where the trace began",
}

# What acts and takes not all guards of actions.
UNGUARDED = {
    "PostgresWrite": {"allow"},                                        # its table and its columns are fixed
    "SlackAskApproval": {"approve", "cap", "rate", "allow"},           # it asks people, where approvals say
}

every = pytest.mark.parametrize("one", installed(), ids=lambda one: one.name)


class Number(BaseModel):
    id: int
    n: int


class Entry(BaseModel):
    guid: str
    titel: str


def test_each_component_of_ours_is_found():
    assert {one.name for one in installed() if one.module.startswith("anton_components.")} == set(MADE)


@every
def test_every_option_is_documented(one: Installed):
    assert one.cls is not None, one.why
    said = "".join(inspect.getdoc(cls) or "" for cls in one.cls.__mro__ if cls is not object)
    assert not [name for name in options_of(one.cls) if not re.search(rf"\b{name}\b", said)]


@every
def test_its_page_is_current(one: Installed):
    assert (PAGES / f"{one.name}.md").read_text() == page(one), "make components"


@every
def test_it_runs_in_an_example_that_is_tested_and_stands_in_the_docs(one: Installed):
    assert one.cls is not None and one.cls.example, f"{one.name} names no example"
    folder = REPO / "examples" / one.cls.example
    assert f"{one.name}(" in (folder / "main.py").read_text() and list(folder.glob("test_*.py"))
    assert f'"{one.cls.example}"' in (REPO / "tests" / "test_testing.py").read_text()
    assert f"[{one.name}](components/{one.name}.md)" in (REPO / "docs" / "components.md").read_text()


def test_there_is_no_page_of_a_component_that_is_gone():
    assert {file.stem for file in PAGES.glob("*.md")} == set(MADE)


@pytest.mark.parametrize("name", MADE)
def test_a_secret_is_in_no_repr_and_in_no_definition(name: str, tmp_path: Path):
    app = App("shop", tmp_path)
    with declaring(app):
        component, source = MADE[name](Table("made")), Table("source")
        assert SECRET not in repr(component)
        if name == "Rss":
            poll(component, every="1m")
        elif name not in ("OpenAiFineTune", "SlackAskApproval"):       # bound by itself; to Notices
            source.on_new_records(component)
    assert not any(SECRET in json.dumps(handler.definition(), default=str) for handler in app.handlers.values())


@every
def test_what_acts_has_a_model_of_its_arguments_and_takes_the_guards_of_actions(one: Installed, tmp_path: Path):
    assert one.cls is not None
    if not issubclass(one.cls, ActionComponent):
        return
    with declaring(App("shop", tmp_path)):
        component = MADE[one.name](Table("made"))
        assert isinstance(component, ActionComponent) and component.arguments is not None
        assert component.arguments.model_config.get("extra") == "forbid"
        guards = {"approve", "cap", "rate", "allow"} - set(options_of(one.cls))
        assert guards == UNGUARDED.get(one.name, set())
        assert component.made().model is component.arguments


@pytest.mark.parametrize("name", MADE)
def test_what_reads_no_field_is_listed_with_the_reason(name: str):
    with declaring(App("listed")):
        assert (not MADE[name](Table("made")).inputs()) == (name in READS_NOTHING)


@pytest.mark.parametrize("name", [name for name in MADE if name not in READS_NOTHING])
def test_wrong_wiring_is_refused_at_migrate(shop, name: str):
    def code() -> None:
        Table("numbers", Number).on_new_records(MADE[name](Table("made")))

    with pytest.raises((Miswired, MigrationError), match=r"it reads .*, which Number of Table\(\"numbers\"\) has not"):
        shop.declare(code).migrate()
    assert not shop.sql("select 1 from anton.handler")


def test_wrong_wiring_of_what_is_polled_is_refused_at_migrate(shop):
    with pytest.raises(Miswired, match=r'Entry of Table\("made"\) needs "titel", which nobody makes'):
        shop.declare(lambda: poll(MADE["Rss"](Table("made", Entry, key="guid")), every="1m")).migrate()
    assert not shop.sql("select 1 from anton.handler")


def test_anothers_component_is_found_by_its_entry_point_and_a_broken_one_hides_none(tmp_path, monkeypatch, capsys):
    (tmp_path / "acme_anton.py").write_text(
        "from anton.component import Component\n\nclass AcmePost(Component):\n    \"\"\"Posts to Acme.\"\"\"\n")
    info = tmp_path / "acme_anton-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-anton\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[anton.components]\nAcmePost = acme_anton:AcmePost\nAcmeGone = acme_gone:AcmeGone\nAcmeInt = builtins:int\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["components", "list"]) == 1                           # something was found
    said = capsys.readouterr().out
    assert "Posts to Acme." in said and "No module named 'acme_gone'" in said and "is no Component" in said
    assert "OpenAiCompletion" in said
    assert main(["components", "show", "AcmePost", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["doc"] == "Posts to Acme."


def test_show_names_options_and_what_is_near(capsys):
    assert main(["components", "show", "FakeModel"]) == 0
    assert "allow_pii" in capsys.readouterr().out
    assert main(["components", "show", "FakeModle"]) == 2
    assert 'Did you mean "FakeModel"?' in capsys.readouterr().err


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for made in installed():
        if made.name in MADE:
            (PAGES / f"{made.name}.md").write_text(page(made))
