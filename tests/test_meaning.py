"""Meaning: types that hold at append, in psql, and where a component is wired to a table."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, NamedTuple, NotRequired
from uuid import uuid4

import psycopg
import pytest
from anton_components.vendor.fake.cognition import FakeModel
from anton_components.vendor.rss.poll import Rss
from anton_components.vendor.slack.action import SlackPostMessage
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    Field,
    RootModel,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    create_model,
    field_serializer,
    field_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypeAliasType, TypedDict

from anton import Table, poll, sql
from anton.app import declaring
from anton.apply import WriteRefused
from anton.errors import BadOption, InvalidRecord, Miswired
from anton.meaning import (
    PII,
    EmailAddress,
    Markdown,
    Meaning,
    Money,
    PersonName,
    PhoneNumber,
    SlackChannel,
    Url,
    meanings,
)
from anton.within import rule_of

GOOD: list[tuple[Any, Any]] = [
    (EmailAddress, "ann.o'neil+x@mail.example.com"), (Url, "https://example.com:8080/a?b=c#d"),
    (PhoneNumber, "+493012345678"), (Money, Decimal("-12.3456")), (PersonName, "Ann"), (SlackChannel, "#general"),
    (SlackChannel, "C0123ABCD"), (PII[EmailAddress], "ann@example.com"), (Markdown, "# one\n\ntwo")]
BAD: list[tuple[Any, Any]] = [
    (EmailAddress, "ann"), (EmailAddress, "Ann <ann@example.com>"), (EmailAddress, "ann@example.com\n"),
    (EmailAddress, "a" * 250 + "@b.cd"), (Url, "ftp://example.com"), (Url, "https://a b"), (Url, "javascript:alert(1)"),
    (PhoneNumber, "030 1234567"), (PhoneNumber, "+0123456789"), (Money, Decimal("0.00001")), (Money, Decimal("1e15")),
    (PersonName, ""), (SlackChannel, "general"), (PII[EmailAddress], "ann")]


class Question(BaseModel):
    id: int
    body: str
    email: PII[EmailAddress] = "ann@example.com"
    asked: int = 0


class Answer(BaseModel):
    id: int | None = None
    completion: str


def wired(shop: Any, component: Callable[[Table[Any], Table[Any]], Any], into: type[BaseModel] = Answer,
          source: type[BaseModel] = Question) -> str:
    """What migrate says of one component; "" when it fits."""
    def code() -> None:
        questions, answers = Table("questions", source), Table("answers", into)
        questions.on_new_records(component(questions, answers))

    try:
        shop.declare(code).migrate()
    except Miswired as error:
        return error.message
    return ""


def test_what_a_type_means_is_kept_at_append_and_at_a_psql_insert(app):
    with declaring(app.app):
        tables = [Table(f"kept{i}", create_model(f"Kept{i}", id=(int, ...), value=(kind, ...)))
                  for i, (kind, _) in enumerate(GOOD + BAD)]
    app.migrate()
    for number, (table, (_, value)) in enumerate(zip(tables, GOOD + BAD, strict=True)):
        if number < len(GOOD):
            table.append({"id": 1, "value": value})
        else:
            with pytest.raises(InvalidRecord):
                table.append({"id": 1, "value": value})
    with psycopg.connect(app.db.dsn, autocommit=True) as conn:
        for number, (table, (_, value)) in enumerate(zip(tables, GOOD + BAD, strict=True)):
            insert = f"insert into {table.name} values (2, %s)"
            if number < len(GOOD):
                conn.execute(insert, [value])
            else:
                with pytest.raises(psycopg.errors.CheckViolation):
                    conn.execute(insert, [value])


# Inside lists, dicts and what is nested


class Contact(BaseModel):
    email: EmailAddress
    site: Url | None = None
    phones: list[PhoneNumber] | None = None


@dataclass
class Link:
    url: Url
    name: str = ""


class Paid(TypedDict):
    amount: Money
    note: NotRequired[Markdown]


class Names(RootModel[list[PersonName]]):
    pass


class Tree(BaseModel):
    owner: EmailAddress
    below: list[Tree] = []


Plate = Annotated[str, StringConstraints(pattern="^[A-Z]{1,3} [0-9]{1,4}$"), Meaning("Plate")]


class Car(BaseModel):
    plate: Plate

    @field_validator("plate", mode="before")
    def upper(cls, value: Any) -> Any:
        return str(value).upper()

    @field_serializer("plate")
    def lower(self, value: str) -> str:
        return value.lower()


Even = Annotated[int, Field(ge=0, multiple_of=2), Meaning("Even")]
ANN, BOB = "ann@example.com", "bob@example.com"
# Of a type: values that it takes, and JSON (of an array: text) that it does not.
INSIDE: list[tuple[Any, list[Any], list[str]]] = [
    (list[EmailAddress], [[], [ANN, BOB]], ["{ann@example.com,ann}", "{NULL}", "{{ann@example.com}}"]),
    (PII[list[EmailAddress]] | None, [None, [ANN]], ["{ann}"]),
    (list[EmailAddress | None], [[None, ANN]], ["{NULL,ann}"]),
    (list[Money], [[Decimal("1.25"), Decimal(-3)]], ["{1.25,0.00001}"]),
    (dict[str, Url], [{}, {"a": "https://a.example.com"}], ['{"a": "ftp://a"}', '{"a": 1}', '{"a": null}', "[]"]),
    (dict[EmailAddress, int], [{ANN: 1}], ['{"ann": 1}']),
    (dict[str, list[Even]], [{"a": [0, 2]}], ['{"a": [1]}', '{"a": [-2]}', '{"a": {}}', '{"a": ["x"]}']),
    (tuple[Plate, Any], [("B 1", None), ("MUC 77", 5)], ['["b 1", 1]', '{"0": "B 1"}']),
    (Contact, [Contact(email=ANN), Contact(email=ANN, site="https://a.example.com", phones=["+493012345678"])],
     ['{"email": "ann"}', '{"email": "ann@example.com", "site": "x"}', '{"email": null}', "[]", '"ann@example.com"',
      '{"email": "ann@example.com", "phones": ["1"]}', '{"email": "ann@example.com", "phones": {}}']),
    (list[Contact] | None, [None, [], [Contact(email=ANN)]], ['[{"email": "ann"}]', '{"email": "ann@example.com"}']),
    (Link, [Link("https://a.example.com")], ['{"url": "a", "name": ""}']),
    (Paid, [{"amount": Decimal("2.5")}, {"amount": Decimal("1E+3"), "note": "x"}],
     ['{"amount": "0.00001"}', '{"amount": 1e15}', '{"amount": "NaN"}', '{"amount": true}']),
    (Names, [Names(["Ann"])], ['[""]']),
    (dict[str, EmailAddress | PhoneNumber], [{"a": ANN, "b": "+493012345678"}], ['{"a": "ann"}']),
    (Tree, [Tree(owner=ANN, below=[Tree(owner=BOB)])], ['{"owner": "ann", "below": []}']),
    # What is not held in SQL: what writes itself, a union with a member that may be anything, fields without a meaning.
    (Car, [Car(plate="b 1")], []), (list[EmailAddress | dict[str, Any]], [[ANN, {"a": 1}]], []),
    (dict[str, Contact | Any], [{"a": 1}], []), (list[dict[str, str]], [[{"a": "b"}]], [])]


def test_what_a_type_means_is_kept_inside_lists_dicts_and_nested_models(app):
    with declaring(app.app):
        tables = [Table(f"kept{i}", create_model(f"Kept{i}", id=(int, ...), value=(kind, ...)))
                  for i, (kind, _, _) in enumerate(INSIDE)]
    app.migrate()
    for table, (_, good, _) in zip(tables, INSIDE, strict=True):
        for number, value in enumerate(good):
            table.append({"id": number, "value": value})
    with psycopg.connect(app.db.dsn, autocommit=True) as conn:
        for table, (_, good, bad) in zip(tables, INSIDE, strict=True):
            conn.execute(f"insert into {table.name} select id + 100, value from {table.name}")
            assert [row.value for row in app.records(table.name)] == good * 2
            for value in bad:
                with pytest.raises(psycopg.errors.CheckViolation):
                    conn.execute(f"insert into {table.name} values (1000, %s)", [value])


def test_what_is_inside_is_checked_at_append(app):
    with declaring(app.app):
        made = Table("made", create_model("Made", id=(int, ...), value=(list[Contact], ...)))
    app.migrate()
    with pytest.raises(InvalidRecord, match="email"):
        made.append({"id": 1, "value": [{"email": "ann"}]})
    with pytest.raises(WriteRefused, match="made_value_check"):
        made.append({"id": 1, "value": [Contact.model_construct(email="ann")]})


def test_who_may_only_insert_is_held_to_what_is_inside(shop):
    mail = create_model("Mail", id=(int, ...), to=(list[EmailAddress], ...), cc=(dict[str, Contact], {}))
    shop.declare(lambda: Table("mails", mail)).migrate()
    assert not shop.migrate(check=True).drift
    role = f"writer_{uuid4().hex[:8]}"
    shop.sql(f"create role {role}; grant insert on mails to {role}")
    try:
        shop.sql(f"set role {role}; insert into mails values (1, '{{ann@example.com}}')")
        with pytest.raises(psycopg.errors.CheckViolation):
            shop.sql(f"set role {role}; insert into mails values (2, '{{ann}}')")
    finally:
        shop.sql(f"drop owned by {role}; drop role {role}")


@given(st.text(st.sampled_from("aZ9.@-_+#/:\n é"), max_size=12), st.sampled_from([EmailAddress, Url, PhoneNumber]))
def test_a_pattern_takes_no_line_break_and_no_blank(text, kind):
    try:
        TypeAdapter(kind).validate_python(text)
    except ValidationError:
        return
    assert not re.search(r"\s", text)


def test_a_field_means_what_its_parts_mean():
    nested = create_model("Nested", at=(PII[str], ...), url=(Url, ...))
    assert {one.name for one in meanings(PII[EmailAddress] | None)} == {"PII", "EmailAddress"}
    assert {one.name for one in meanings(list[PII[str]])} == {"PII"}
    assert {one.name for one in meanings(nested)} == {"PII"} and not meanings(str)


def recursive(of: Callable[[Any], Any]) -> Any:
    """type X = of(X): from Python 3.12 a statement, so that what is before it is made by hand."""
    if sys.version_info >= (3, 12):
        names: dict[str, Any] = {"of": of}
        exec("type X = of(X)", names)  # noqa: S102  (older Pythons do not parse it)
        return names["X"]
    made = TypeAliasType("X", Any)
    object.__setattr__(made, "__value__", of(made))
    return made


def test_a_type_that_is_below_itself_has_an_end():
    tree = recursive(lambda x: dict[str, x] | list[x] | EmailAddress | None)
    assert {one.name for one in meanings(tree)} == {"EmailAddress"} and rule_of(list[tree]) is None
    assert rule_of(tuple[EmailAddress, tree]) == {"items": [rule_of(EmailAddress), {"null": True}]}
    told = recursive(lambda x: list[x] | PII[str])
    assert [one.name for one in meanings(create_model("Outer", inner=(told, ...)))] == ["PII"]


class Person(NamedTuple):
    name: str
    mail: PII[str]


class Told(TypedDict):
    at: NotRequired[PII[str]]


@dataclass
class Card:
    holder: PII[str] = ""
    others: list[Card] = field(default_factory=list)


@pydantic_dataclass
class Badge:
    holder: PII[str]


class Team(BaseModel):
    cards: dict[str, list[Card]]


@pytest.mark.parametrize("kind", [Person, Told, Card, Badge, Team, list[Card], dict[str, Told], Card | None,
                                  list[dict[str, Person]], tuple[int, Badge], Annotated[Team, Field()]])
def test_pii_in_what_is_nested_makes_the_whole_field_pii(kind):
    assert [one.name for one in meanings(kind)] == ["PII"]
    assert [one.name for one in meanings(create_model("Outer", inner=(kind, ...)))] == ["PII"]


def test_pii_of_a_type_that_cannot_be_looked_up_is_pii():
    def local() -> Any:
        Inner = PII[str]

        @dataclass
        class Outer:
            name: str
            inner: PII[Inner]

        return Inner, Outer

    assert [one.name for one in meanings(local()[1])] == ["PII"]


def test_pii_in_what_is_nested_reaches_no_model(shop):
    source = create_model("Source", id=(int, ...), body=(str, ...), card=(Card, ...), told=(list[Told], ...))
    plain = create_model("Plain", id=(int | None, None), completion=(str, ...), card=(dict[str, Any], ...))

    def said(into: type[BaseModel] = Answer, **options: Any) -> str:
        return wired(shop, lambda _, to: FakeModel(to, **options), into=into, source=source)

    assert 'gives "card" of Table("questions") to a model, and that is PII' in said(prompt="{body} {card}")
    assert 'gives "told"' in said(prompt="{body}", system="{told}")
    assert 'reads "told" of Table("questions")' in said(
        prompt="{body} {more}", context={"more": sql("select told -> 0 ->> 'at' as x from questions")})
    assert said(prompt="{body} {card}", allow_pii=True) == ""
    assert '"card" is carried over: it is PII' in said(plain, prompt="{body}")


def test_a_field_that_a_component_reads_and_the_table_has_not_is_refused_with_the_map_that_fits(shop):
    assert ('it reads "prompt" (text), which Question of Table("questions") has not. Say map={"prompt": "body"}.'
            in wired(shop, lambda _, into: FakeModel(into)))
    assert not shop.sql("select 1 from anton.handler")
    assert wired(shop, lambda _, into: FakeModel(into, map={"prompt": "body"})) == ""


def test_a_map_to_a_field_that_is_not_there_is_refused(shop):
    assert 'Did you mean "body"?' in wired(shop, lambda _, into: FakeModel(into, map={"prompt": "bdy"}))


def test_a_field_of_another_type_is_refused(shop):
    assert ('it reads "prompt" as text, and Question of Table("questions") has "asked" as bigint'
            in wired(shop, lambda _, into: FakeModel(into, map={"prompt": "asked"})))


def test_a_row_that_the_output_table_types_otherwise_is_refused(shop):
    wrong = create_model("Wrong", id=(int | None, None), completion=(int, ...))
    assert ('it makes "completion" as text, and Wrong of Table("answers") has it as bigint'
            in wired(shop, lambda _, into: FakeModel(into, map={"prompt": "body"}), into=wrong))


@pytest.mark.parametrize("field, kind", [("cost", float), ("usage", dict[str, Any])])
def test_what_a_service_may_not_say_is_refused_where_it_must_be_said(shop, field, kind):
    wrong = create_model("Wrong", id=(int | None, None), **{field: (kind, ...)})
    assert (f'it makes "{field}", which may be None, and in Wrong of Table("answers") it may not'
            in wired(shop, lambda _, into: FakeModel(into, map={"prompt": "body"}), into=wrong))


def test_one_meaning_is_not_wired_to_another(shop):
    wrong = create_model("Wrong", id=(int | None, None), channel=(PhoneNumber, ...))
    assert ('it makes "channel" as SlackChannel, and in Wrong of Table("answers") it is PhoneNumber'
            in wired(shop, lambda _, into: SlackPostMessage(message_template="{body}", into=into), into=wrong))


def test_a_template_is_compared_with_the_table(shop):
    assert 'it reads "text" (any type)' in wired(shop, lambda _, into: SlackPostMessage())
    assert wired(shop, lambda _, into: SlackPostMessage(map={"text": "body"})) == ""


def test_pii_reaches_no_model_unless_it_is_allowed(shop):
    def leaking(**options: Any) -> Any:
        return lambda _, into: FakeModel(into, prompt="Answer {email}: {body}", **options)

    assert 'it gives "email" of Table("questions") to a model, and that is PII' in wired(shop, leaking())
    assert wired(shop, leaking(allow_pii=True)) == ""
    assert "PII" in wired(shop, lambda _, into: FakeModel(into, prompt="Say {x}", map={"x": "email"}))
    assert "PII" in wired(shop, lambda _, into: FakeModel(into, prompt="{body}", system="You talk to {email}"))


@pytest.mark.parametrize(("query", "leaks"), [
    ("select email from questions where id = {id}", True), ("select * from questions", True),
    ("select q.* from public.questions q", True), ("SELECT EMAIL FROM Questions", True),
    ("select to_jsonb(q) as q from questions as q", True), ("table questions", True),
    ("select q.body from questions q where q.id = {id}", False), ("select count(*) from questions", False),
    ("select count( * ) from questions", False), ("select json_agg(q.*) from questions q", True),
    ("select body from questions where body <> 'email'", False), ("select 1 as email", False)])
def test_pii_in_context_from_sql_is_seen_where_the_column_is_named(shop, query, leaks):
    said = wired(shop, lambda _, into: FakeModel(into, prompt="{body} {more}", context={"more": sql(query)}))
    assert ('context "more" reads "email" of Table("questions"), and that is PII' in said) is leaks


def test_pii_that_is_carried_over_stays_pii(shop):
    def carried(kind: Any) -> str:
        into = create_model("Into", id=(int | None, None), completion=(str, ...), email=(kind, ...))
        return wired(shop, lambda _, into: FakeModel(into, map={"prompt": "body"}), into=into)

    assert '"email" is carried over: it is PII' in carried(str)
    assert '"email" is carried over: it is EmailAddress' in carried(PII[Url])
    assert carried(PII[EmailAddress]) == ""


def test_allow_pii_is_a_plain_yes_or_no(shop):
    with declaring(shop.app), pytest.raises(BadOption, match="allow_pii"):
        FakeModel(Table("answers"), allow_pii="yes")  # type: ignore[arg-type]


# PII behind views and self-joins


@pytest.mark.parametrize(("query", "leaks"), [
    ("select to_jsonb(a) from questions a join questions b on a.id = b.id", True),
    ("select to_jsonb(b) from questions a join questions b on a.id = b.id", True),
    ("select b.body from questions a join questions b on a.id = b.id", False),
    ("select c from questions as q (a, b, c, d)", True),
    ("select {email} as mail", True), ("select 'to ' || {email} from questions q", True),
    ("select c from (select {email} as c) x", True), ("select q.body from questions q where q.id = {id}", False)])
def test_pii_by_another_name_is_seen(shop, query, leaks):
    said = wired(shop, lambda _, into: FakeModel(into, prompt="{body} {more}", context={"more": sql(query)}))
    assert ("that is PII" in said) is leaks, said


class Note(BaseModel):
    id: int
    author: str
    body: str


@pytest.mark.parametrize(("query", "leaks"), [
    ("select n.body from notes n where n.author = {email}", False), ("select {email} as mail from notes n", True)])
def test_a_bound_value_reaches_the_model_only_where_it_is_selected(shop, query, leaks):
    def make(_: Any, into: Any) -> Any:
        Table("notes", Note)
        return FakeModel(into, prompt="{body} {more}", context={"more": sql(query)})

    said = wired(shop, make)
    assert ('selects {email}, which is "email" of Table("questions")' in said) is leaks, said


@pytest.mark.parametrize(("query", "leaks"), [
    ("select contact from people", True), ("select * from people", True), ("select contact from crowd", True),
    ("select id from people", False), ("select n from crowd", False)])
def test_pii_behind_a_view_of_a_file_or_of_the_database_is_seen(shop, query, leaks):
    shop.file("sql/people.sql", "create or replace view people as select id, email as contact from questions;\n")
    assert wired(shop, lambda _, into: FakeModel(into, map={"prompt": "body"})) == ""
    shop.sql("create view crowd as select contact, count(*) as n from people group by contact")
    said = wired(shop, lambda _, into: FakeModel(into, prompt="{body} {more}", context={"more": sql(query)}))
    assert ("that is PII" in said) is leaks, said


# Fields that nobody makes, and numbers


def test_a_field_that_the_output_table_needs_and_nobody_makes_is_refused(shop):
    needs = create_model("Needs", id=(int | None, None), completion=(str, ...), score=(int, ...))
    assert ('Needs of Table("answers") needs "score", which nobody makes'
            in wired(shop, lambda _, into: FakeModel(into, map={"prompt": "body"}), into=needs))
    carried = create_model("Carried", id=(int | None, None), completion=(str, ...), asked=(int, ...), of=(int, ...))
    assert wired(shop, lambda _, into: FakeModel(into, map={"prompt": "body", "of": "id"}), into=carried) == ""


@pytest.mark.parametrize(("made", "kept", "fits"), [
    (int, float, True), (int, Decimal, True), (float, Decimal, True), (float, int, False), (Decimal, int, False),
    (Decimal, float, False), (Decimal, Money, True)])
def test_a_number_fits_where_no_digit_is_lost(shop, made, kept, fits):
    score = create_model("Score", n=(made, ...))
    into = create_model("Into", id=(int | None, None), n=(kept, ...))
    said = wired(shop, lambda _, into: FakeModel(into, output=score, map={"prompt": "body"}), into=into)
    assert (said == "") is fits and ("Digits would be lost" in said) is not fits, said


@pytest.mark.parametrize(("fields", "said"), [
    ({"guid": (int, ...)}, 'it makes "guid" as text'), ({"guid": (str, ...), "price": (int, ...)}, 'needs "price"'),
    ({"guid": (str, ...), "published": (datetime, ...)}, "may be None"),
    ({"guid": (str, ...), "title": (str, ...)}, "")])
def test_a_feed_is_compared_with_its_table(shop, fields, said):
    def code() -> None:
        articles = Table("articles", create_model("Article", **fields), key="guid")
        poll(Rss(articles, "https://example.com/feed.xml"), every="15m")

    shop.declare(code)
    if said:
        with pytest.raises(Miswired, match=said):
            shop.migrate()
    else:
        shop.migrate()
