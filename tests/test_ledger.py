"""Ledger: what becomes of calls when connections break, answers come late, and several ask the same at once."""

from __future__ import annotations

import asyncio
import logging
import threading
from datetime import timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from anton_components.vendor.openai.cognition import OpenAiCompletion
from llm import Llm
from working import Bench, cutting, met

from anton import Table
from anton.app import App, declaring
from anton.ask import MARGIN, About, Answer, Question, most_tokens, with_mode
from anton.db import Database
from anton.errors import WorldError
from anton.memo import asking, wait_for_other
from anton.secret import hush_clients

ABOUT = About("shop", "handler", "asked")
PRICE = {"input": "1000", "output": "2000"}


def completion(llm: Llm, **options: Any) -> OpenAiCompletion:
    with declaring(App("shop")):
        return OpenAiCompletion(Table("answers"), **{
            "api_key": "sk-good", "model": "m", "base_url": f"{llm.url}/v1", "price": PRICE, "max_tokens": 10,
            "budget": "1 USD/day", **options})


def question(text: str = "hi", **fields: Any) -> Question:
    return Question("m", ({"role": "user", "content": text},), **{"max_tokens": 10, **fields})


async def ask(made: OpenAiCompletion, db: Database, text: str = "hi", **fields: Any) -> Answer:
    return await made._asker.ask(db, question(text, **fields), ABOUT, made.price_of("m"))


async def states(bench: Bench) -> list[Any]:
    return [tuple(row) for row in await bench.sql("select state, count(*) from anton.call group by 1 order by 1")]


async def spent(bench: Bench) -> list[Any]:
    return [tuple(row) for row in await bench.sql("select settled, reserved from anton.spent")]


async def test_an_answer_whose_settling_was_not_heard_of_is_settled_once(db, llm):
    bench = await Bench.make(db, lambda: None)
    await bench.full_hour()                                            # no day ends meanwhile
    llm.headers = {"x-ratelimit-limit-tokens": "60000"}
    made = completion(llm, limit="60000 tokens/min")
    async with cutting(db, b"answered_by") as (proxied, cuts):
        cuts.append(b"")
        answer = await ask(made, proxied)
        await proxied.close()
    assert not cuts and (await states(bench), len(llm.asked)) == ([("done", 1)], 1)
    assert await spent(bench) == [(answer.cost, Decimal(0))] and answer.cost


async def test_a_grant_that_was_not_heard_of_is_asked_anew_after_its_lease_and_charged_until_it_is_settled(db, llm):
    bench = await Bench.make(db, lambda: None)
    await bench.full_hour()
    made = completion(llm)
    async with cutting(db, b"prompt_version") as (proxied, cuts):
        cuts.append(b"")
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            await ask(made, proxied)
        await proxied.close()
    await bench.until("select exists (select from anton.call)")
    assert await states(bench) == [("asking", 1)] and not llm.asked
    await bench.advance(timedelta(seconds=60 + MARGIN + 1))
    answer = await ask(made, db, "hi")
    await bench.sql("select anton.lapse_calls()")
    assert (await states(bench), len(llm.asked)) == ([("done", 1), ("unknown", 1)], 1)
    unknown = await bench.value("select reserved from anton.call where state = 'unknown'")
    assert await spent(bench) == [(answer.cost + unknown, Decimal(0))]
    assert await bench.value("select anton.settle_call(id, 0) from anton.call where state = 'unknown'")
    assert await spent(bench) == [(answer.cost, Decimal(0))]


async def test_a_database_that_ends_all_sessions_while_models_are_asked_costs_no_answer(db, llm):
    bench = await Bench.make(db, lambda: None)
    made = completion(llm, budget=None)
    llm.delay = 0.5
    asked = [asyncio.create_task(ask(made, db, f"q{n}")) for n in range(30)]
    await met(lambda: llm.most == 30)
    await bench.sql("select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() "
                    "and pid <> pg_backend_pid()")
    assert {answer.reply.text for answer in await asyncio.gather(*asked)} == {f"re: q{n}" for n in range(30)}
    assert (await states(bench), len(llm.asked)) == ([("done", 30)], 30)


async def test_a_lease_outlasts_its_call_however_long_the_loop_is_busy(db, llm):
    bench = await Bench.make(db, lambda: None)
    made = completion(llm)
    llm.script("hang")
    asked = asyncio.create_task(ask(made, db, timeout=60.0))
    await met(llm.hung.is_set)
    assert await bench.value("select lease_until - at from anton.call") == timedelta(seconds=60 + MARGIN)
    await bench.advance(timedelta(seconds=61))
    assert await bench.value("select anton.lapse_calls()") == 0
    asked.cancel()
    await asyncio.wait({asked})
    await bench.until("select exists (select from anton.call where state = 'unknown' and lease_until is null)")


async def test_several_processes_that_ask_the_same_at_once_pay_for_one_answer(db, llm):
    """Each loop has a ledger of its own, as each process has."""
    bench = await Bench.make(db, lambda: None)
    made = completion(llm)
    llm.delay = 0.5
    answers: list[Answer] = []

    async def several() -> None:
        mine = Database(db.dsn)
        answers.extend(await asyncio.gather(*(ask(made, mine) for _ in range(5))))
        await mine.close()

    threads = [threading.Thread(target=lambda: asyncio.run(several())) for _ in range(3)]
    for thread in threads:
        thread.start()
    await met(lambda: not any(thread.is_alive() for thread in threads))
    assert len(llm.asked) == 1 and sorted(answer.memo for answer in answers) == [False] + [True] * 14
    assert await states(bench) == [("done", 1)]


# One outage


async def test_who_waited_for_the_same_question_takes_the_outage_it_ended_with_as_its_own():
    async def leader() -> None:
        with pytest.raises(WorldError), asking("hash"):
            await asyncio.sleep(0)
            error = WorldError("the service is down")
            error.after = timedelta(seconds=7)
            raise error

    async def follower() -> WorldError:
        with pytest.raises(WorldError) as caught:
            await wait_for_other("hash", 20)
        return caught.value

    _, *errors = await asyncio.gather(leader(), follower(), follower())
    assert [(error.message, error.after) for error in errors] == [("the service is down", timedelta(seconds=7))] * 2
    assert not await wait_for_other("hash", 20)


@pytest.mark.parametrize("gave_up, waits", [(True, True), (False, False)])
async def test_one_that_had_another_model_to_go_to_speaks_for_its_like_alone(gave_up, waits):
    async def leader() -> None:
        with pytest.raises(WorldError), asking("hash", last=False):
            await asyncio.sleep(0)
            raise WorldError("busy")

    async def follower() -> bool:
        return await wait_for_other("hash", 20, last=waits)

    _, found = await asyncio.gather(leader(), follower(), return_exceptions=True)
    assert found is True if gave_up else isinstance(found, WorldError)


async def test_one_outage_is_not_waited_for_by_each_who_asks_the_same(db, llm):
    await Bench.make(db, lambda: None)
    made = completion(llm)
    llm.script(*[500] * 200)
    found = await asyncio.gather(*(ask(made, db) for _ in range(40)), return_exceptions=True)
    assert all(isinstance(error, WorldError) for error in found) and len(llm.asked) < 60


# What is said of it


async def test_a_password_in_an_address_is_in_no_log_error_or_table(db, llm, caplog):
    bench = await Bench.make(db, lambda: None)
    hush_clients()
    made = completion(llm, base_url=llm.url.replace("//", "//me:hunter2@") + "/v1")
    with caplog.at_level(logging.INFO):
        hush_clients()
        with pytest.raises(WorldError, match="answered 401") as caught:   # it goes in place of the key
            await ask(made, db)
    assert "hunter2" not in caplog.text + str(caught.value)
    for table in ("call", "memo", "quota", "budget"):
        assert not await bench.value(f"select count(*) from anton.{table} t where t::text like '%hunter2%'"), table
    assert await states(bench) == [("failed", 1)]


def test_a_tool_that_is_called_takes_tokens_of_its_own():
    asked = question(schema={"type": "object"})
    assert most_tokens(with_mode(asked, "tool")) >= most_tokens(with_mode(asked, "schema")) + 500
