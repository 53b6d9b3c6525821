"""Embedding: texts as vectors, against a service over a real socket, and what is near them by pgvector."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any

import pytest
from anton_components.vendor.openai.cognition import OpenAiCompletion
from anton_components.vendor.openai.embedding import OpenAiEmbedding
from llm import Llm
from pydantic import BaseModel, ValidationError
from working import morning

from anton import Table, Vector, sql
from anton.app import declaring
from anton.embedding import packed, unpacked, words_vector
from anton.errors import BadOption, InvalidRecord, Miswired, NoVectors, UnknownOption

pytestmark = pytest.mark.once("wires: the server is asked for the same")

PRICE = {"input": "1000"}                                              # 0.001 a token


class Note(BaseModel):
    id: int
    text: str
    customer: str


class Passage(BaseModel):
    id: int | None = None
    text: str
    customer: str
    embedding: Annotated[list[float], Vector(26)]


class Plain(BaseModel):
    text: str
    embedding: list[float]


@pytest.fixture
def pgvector(app) -> None:
    if not app._fetch("select from pg_available_extensions where name = 'vector'"):
        pytest.skip("this server has no pgvector")


def embedding(to: Table[Any], llm: Llm, **options: Any) -> OpenAiEmbedding:
    return OpenAiEmbedding(to, **{"api_key": "sk-good", "base_url": f"{llm.url}/v1", "model": "e", "price": PRICE,
                                  **options})


def declare(app: Any, llm: Llm, model: Any = Plain, **options: Any) -> None:
    with declaring(app.app):
        made = Table("passages", model) if model else Table("passages")
        Table("notes", Note).on_new_records(embedding(made, llm, **options))
    app.migrate()


def write(app: Any, *texts: str) -> None:
    app.tables["notes"].extend([{"id": id, "text": text, "customer": f"c{id}"} for id, text in enumerate(texts, 1)])
    app.run()


def rows(app: Any, query: str) -> list[Any]:
    return [tuple(row) for row in app._fetch(query.replace("anton.", "{schema}."))]


def test_every_record_gets_its_own_vector_and_many_go_with_one_request(live, llm):
    declare(live, llm)
    write(live, *(f"{'a' * n} b" for n in range(1, 101)))
    assert {record.text: record.embedding[:3] for record in live.records("passages")} == {
        f"{'a' * n} b": [float(n), 1.0, 0.0] for n in range(1, 101)}
    assert len(llm.asked) <= 20 and not live.dead
    assert rows(live, "select sum(tokens_in), sum(cost), count(*) from anton.call where state = 'done'") == [
        (llm.billed, llm.billed * Decimal("0.001"), 100)]


@pytest.mark.parametrize("said", ["stated", "learnt"])
def test_under_a_limit_of_requests_texts_wait_for_the_next_one_together_and_count_as_one(said, live, llm):
    if said == "learnt":
        llm.headers = {"x-ratelimit-limit-requests": "300"}
    declare(live, llm, memo=False, **({"limit": "300 requests/min"} if said == "stated" else {}))
    write(live, "first")
    asked = len(llm.asked)
    live.tables["notes"].extend([{"id": n, "text": f"{'a' * n} b", "customer": "c"} for n in range(2, 152)])
    live.run()
    assert len(live.records("passages")) == 151 and not live.dead
    made = len(llm.asked)
    assert made - asked < 50 and max(len(body["input"]) for body in llm.asked) > 20
    ((seconds,),) = rows(live, "select extract(epoch from next_at - (select min(at) from anton.call)) from anton.quota "
                               "where unit = 'requests'")
    assert round(float(seconds) / 60 * 300 * 0.95, 2) >= made - (said == "learnt")  # the first one taught it


def test_a_text_too_many_for_a_limit_of_tokens_goes_with_the_next_request(live, llm):
    declare(live, llm, memo=False, limit="6000 requests/min, 200000 tokens/min")   # 2,000 tokens may be early: 40 texts
    write(live, *(f"text {n}" for n in range(100)))
    assert len(live.records("passages")) == 100 and not live.dead and len(llm.asked) > 1


def test_equal_texts_are_embedded_once(live, llm):
    declare(live, llm)
    write(live, *["the same"] * 50)
    assert [body["input"] for body in llm.asked] == [["the same"]] and len(live.records("passages")) == 50


def test_fields_of_the_same_names_come_along_and_without_a_model_all_is_told(live, llm):
    declare(live, llm, None, map={"embedding": "meaning"})
    write(live, "abba")
    (made,) = live.records("passages")
    assert (made["text"], made["meaning"][:3], made["model"], made["usage"], made["cost"]) == (
        "abba", [2.0, 2.0, 0.0], "e-v1", {"input": 1}, 0.001)


def test_a_text_that_is_refused_is_a_dead_letter_of_its_own(live, llm):
    declare(live, llm)
    write(live, *(f"text {n}" for n in range(20)), "poison", "")
    for _ in range(6):
        live.advance("1h")
    assert len(live.records("passages")) == 20
    assert sorted(dead.key for dead in live.dead) == [[21], [22]]
    assert all("input is too long" in dead.error or "empty" in dead.error for dead in live.dead)


def test_a_service_that_is_unwell_blames_no_record(live, llm):
    declare(live, llm)
    llm.script(*[500] * 3)
    write(live, "a", "b")
    assert not live.dead
    live.advance("2m")
    assert len(live.records("passages")) == 2 and not live.dead


def test_at_its_budget_it_waits(live, llm):
    morning(live)
    declare(live, llm, budget="20 USD/day", memo=False, price={"input": "100000"})   # 0.2 a text, 12.8 held for it
    write(live, *("some words" for _ in range(60)))
    done = len(live.records("passages"))
    assert rows(live, "select settled, reserved from anton.spent") == [(done * Decimal("0.2"), 0)]
    assert 30 <= done < 60 and not live.dead


def test_a_service_that_says_nothing_of_tokens_leaves_the_cost_unknown(live, llm):
    llm.silent = True
    declare(live, llm, None)
    write(live, "abba")
    assert [(made["usage"], made["cost"]) for made in live.records("passages")] == [(None, None)]
    assert rows(live, "select unpriced, cost from anton.list_costs(1)") == [(1, None)]


def test_fewer_numbers_are_asked_for(live, llm):
    declare(live, llm, dimensions=2)
    write(live, "abba")
    assert live.records("passages")[0].embedding == [2.0, 2.0] and llm.asked[0]["dimensions"] == 2


def test_what_is_near_is_found_and_stands_in_the_prompt(live, llm, pgvector):
    with declaring(live.app):
        passages, asked = Table("passages", Passage, index=["embedding"]), Table("asked", Passage, key="id")
        Table("notes", Note).on_new_records(embedding(passages, llm))
        near = sql("select text from passages order by embedding <=> {embedding} limit 1")
        asked.on_new_records(OpenAiCompletion(
            Table("answers"), api_key="sk-good", base_url=f"{llm.url}/v1", model="m", context={"near": near},
            prompt="Given:\n{near}\nanswer {text}"))
    live.migrate()
    write(live, "aaaa", "bbbb", "cccc")
    asked.append({"text": "bab", "customer": "x", "embedding": [1.0, 2.0] + [0.0] * 24})
    live.run()
    assert llm.asked[-1]["messages"][-1]["content"] == "Given:\n- bbbb\nanswer bab"
    assert {one.text: one.embedding[:3] for one in live.records("passages")}["bbbb"] == [0.0, 4.0, 0.0]
    found = live._loop.run(_fetch(sql("select text from passages order by embedding <=> {x} limit 1",
                                      x=[9.0] + [0.0] * 25)))
    assert [row["text"] for row in found] == ["aaaa"]
    assert rows(live, "select indexdef ~ 'hnsw .*vector_cosine_ops' from pg_indexes "
                      "where indexname = 'passages_embedding_idx'") == [(True,)]
    live.migrate()                                                     # nothing is left to do
    assert rows(live, "select count(*) from pg_extension where extname = 'vector'") == [(1,)]


async def _fetch(query: Any) -> Any:
    return await query


def test_a_vector_of_another_length_is_refused_where_it_is_written(app, pgvector):
    with declaring(app.app):
        passages = Table("passages", Passage)
    app.migrate()
    for wrong in ([1.0] * 25, [float("nan")] * 26):
        with pytest.raises(InvalidRecord):
            passages.append({"text": "a", "customer": "c", "embedding": wrong})
    with pytest.raises(ValidationError):
        Passage(text="a", customer="c", embedding="[1]")  # type: ignore[arg-type]


def test_a_vector_column_can_come_later(app, pgvector):
    class Maybe(Note):
        embedding: Annotated[list[float], Vector(3)] | None = None

    with declaring(app.app):
        Table("notes", Note)
    app.migrate()
    app.app.clear()
    with declaring(app.app):
        notes = Table("notes", Maybe)
    app.migrate()
    notes.append({"id": 1, "text": "a", "customer": "c", "embedding": [1, 2, 3]})
    notes.append({"id": 2, "text": "a", "customer": "c"})
    assert [record.embedding for record in app.records("notes")] == [[1.0, 2.0, 3.0], None]


def test_where_there_is_no_pgvector_migrate_says_so(app):
    if app._fetch("select from pg_available_extensions where name = 'vector'"):
        pytest.skip("this server has pgvector")
    with declaring(app.app):
        Table("passages", Passage)
    with pytest.raises(NoVectors, match='"embedding" is a Vector, and this server has no pgvector'):
        app.migrate()


@pytest.mark.parametrize("options, why", [
    ({"dimensions": 0}, "from 1"), ({"model": ["a", "b"]}, "not to be compared"), ({"dimensions": 25}, r"Vector\(26\)"),
    ({"budget": "1 USD/day", "price": None}, "price="), ({"map": {"embedding": "vector"}}, 'the field "vector"'),
    ({"base_url": None, "model": "text-embedding-3-small"}, "makes 1536 numbers")])
def test_what_cannot_be_is_refused_when_it_is_declared(options, why, app, llm):
    with declaring(app.app), pytest.raises(BadOption, match=why):
        embedding(Table("passages", Passage), llm, **options)


def test_a_vector_that_may_be_missing_has_a_size_all_the_same(app, llm):
    class Maybe(BaseModel):
        text: str
        embedding: Annotated[list[float], Vector(26)] | None = None

    with declaring(app.app), pytest.raises(BadOption, match=r"Vector\(26\)"):
        embedding(Table("passages", Maybe), llm, dimensions=25)


def test_a_table_without_the_text_is_refused_at_migrate(live, llm):
    with declaring(live.app):
        Table("notes", Note).on_new_records(embedding(Table("other"), llm, map={"text": "body"}))
    with pytest.raises(Miswired, match='Note of Table\\("notes"\\) has no field "body"'):
        live.migrate()


def test_an_unknown_option_says_what_was_meant(app):
    with declaring(app.app), pytest.raises(UnknownOption, match='Did you mean "dimensions"'):
        OpenAiEmbedding(Table("t"), dimension=3)  # type: ignore[call-arg]


def test_without_a_key_an_echo_embeds_by_the_words(app, llm):
    declare(app, llm, api_key="xxxx", dimensions=64)
    write(app, "the parcel is late", "my parcel is late", "change the password")
    first, second, third = (record.embedding for record in app.records("passages"))

    def like(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert like(first, second) > like(first, third) and like(first, first) == pytest.approx(1) and not llm.asked
    assert words_vector("", 4) == words_vector("", 4) and len(words_vector("a b", 4)) == 4


def test_a_vector_survives_its_memo():
    numbers = unpacked(packed([0.1, -2.5, 3e-9]))
    assert numbers == pytest.approx([0.1, -2.5, 3e-9], rel=1e-6) and unpacked(packed(numbers)) == numbers
