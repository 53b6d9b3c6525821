"""Think: completions through memo, ledger, budget and limit, against services over real sockets."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from anton_components.vendor.anthropic.cognition import AnthropicCompletion
from anton_components.vendor.fake.cognition import FakeModel
from anton_components.vendor.openai.cognition import OpenAiCompletion
from llm import Llm
from pydantic import BaseModel
from working import Bench, met, morning

from anton import Table, sql
from anton.app import declaring
from anton.cli import main
from anton.errors import BadOption, UnknownOption
from anton.ledger import ledger_of

CALL = {"hash": "h", "ttl": 60, "quota": "q", "tokens": 1, "budgets": [], "app": "shop", "handler": "h",
        "provider": "p", "model": "m"}
PRICE = {"input": "1000", "output": "2000"}                            # for a million tokens: 0.001 and 0.002 each


class Triage(BaseModel):
    kind: Literal["bug", "question"]
    urgent: bool = False


def openai(llm: Llm, **options: Any) -> Callable[[Any], OpenAiCompletion]:
    return lambda to: OpenAiCompletion(to, **{"api_key": "sk-good", "model": "m", "base_url": f"{llm.url}/v1",
                                              "price": PRICE, **options})


def declare(app: Any, make: Callable[[Any], Any], model: Any = None, **options: Any) -> Any:
    """asked -> the component -> answers."""
    with declaring(app.app):
        asked, answers = Table("asked"), Table("answers", model) if model else Table("answers")
        made = asked.on_new_records(make(answers), **options)
    app.migrate()
    return made


def ask(app: Any, *prompts: str, **fields: Any) -> None:
    app.tables["asked"].extend([{"prompt": prompt, **fields} for prompt in prompts])
    app.run()


def rows(app: Any, query: str) -> list[Any]:
    return [tuple(row) for row in app._fetch(query.replace("anton.", "{schema}."))]


# The ledger


def test_every_call_is_a_row_with_its_tokens_and_what_it_cost(live, llm):
    declare(live, openai(llm, max_tokens=20, temperature=0.5))
    ask(live, "what is it")
    assert rows(live, "select state, provider, model, answered_by, tokens_in, tokens_out, cost, reserved is not null, "
                      "params, price_version, handler from anton.call") == [
        ("done", "OpenAI", "m", "m-2026-03-17", 3, 4, Decimal("0.011"), True, {"temperature": 0.5, "max_tokens": 20},
         "given", "OpenAiCompletion")]
    (answer,) = live.records("answers")
    assert (answer["completion"], answer["cost"], answer["usage"]) == ("re: what is it", 0.011,
                                                                      {"input": 3, "output": 4})


def test_a_price_that_is_not_known_is_no_zero(live, llm):
    declare(live, openai(llm, price=None))
    ask(live, "hi")
    assert rows(live, "select state, cost, reserved from anton.call") == [("done", None, None)]
    assert rows(live, "select unpriced, cost from anton.list_costs(1)") == [(1, None)]
    assert live.records("answers")[0]["cost"] is None


def test_what_the_service_counted_is_what_the_ledger_has(live, llm):
    declare(live, openai(llm))
    llm.script(429, "answer", 500, "answer", 503)
    ask(live, *(f"question number {n}" for n in range(20)))
    assert rows(live, "select sum(tokens_in + tokens_out), count(*) filter (where state = 'done') from anton.call") == [
        (llm.billed, 20)]
    assert rows(live, "select count(*), sum(cost) from anton.call where state = 'failed'") == [(3, Decimal(0))]
    assert len(live.records("answers")) == 20 and not live.dead


def test_no_answer_in_time_is_unknown_and_charged_at_its_most_until_somebody_settles_it(live, llm, capsys):
    morning(live)
    made = declare(live, openai(llm, max_tokens=10, budget="10 USD/day"))
    llm.script("answer", "hang", "hang", "hang")
    ask(live, "one")                                                   # what is answered is so in time
    made.timeout = 0.2
    ask(live, "hi")
    made.timeout = 60.0
    unknown = rows(live, "select id, reserved, cost from anton.call where state = 'unknown'")
    assert len(unknown) == 3 and all(cost is None and reserved > 0 for _, reserved, cost in unknown)
    held = sum(reserved for _, reserved, _ in unknown)
    paid = "select sum(cost) from anton.call where state = 'done'"
    assert rows(live, "select settled, reserved from anton.spent") == [(rows(live, paid)[0][0] + held, Decimal(0))]
    live.advance("2m")
    assert len(live.records("answers")) == 2
    paid = rows(live, paid)[0][0]
    for (id, _, _), cost in zip(unknown, (Decimal("0.5"), Decimal(0), None), strict=True):
        assert rows(live, f"select anton.settle_call({id}, {'null' if cost is None else cost})") == [(True,)]
    assert rows(live, "select settled from anton.spent") == [(paid + Decimal("0.5") + unknown[2][1],)]
    assert rows(live, f"select anton.settle_call({unknown[0][0]}, 1)") == [(False,)]
    assert rows(live, "select unknown from anton.list_costs(1)") == [(0,)]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "/v1"])
def test_a_request_that_never_arrived_costs_nothing(url, live, llm):
    morning(live)
    declare(live, openai(llm, base_url=url, max_tokens=10, budget="1 USD/day"))
    ask(live, "hi")
    assert rows(live, "select distinct state, cost from anton.call") == [("failed", Decimal(0))]
    assert rows(live, "select settled, reserved from anton.spent") == [(Decimal(0), Decimal(0))]
    assert not live.dead


@pytest.mark.parametrize("status, state", [(500, "failed"), (503, "failed"), (502, "unknown"), (504, "unknown")])
def test_what_a_gateway_lost_may_have_been_paid(status, state, live, llm):
    declare(live, openai(llm, max_tokens=10))
    llm.script(status)
    ask(live, "hi")
    assert rows(live, "select state from anton.call order by id") == [(state,), ("done",)]


def test_an_answer_after_its_call_lapsed_is_kept(live, llm):
    declare(live, openai(llm))
    def text(*facts: Any) -> str:
        return json.dumps(facts).replace("{", "{{").replace("}", "}}")

    call = text({"n": 0, **CALL})
    begun = f"select verdict, call_id from anton.begin_calls('{call}', 'w') where n = 0"
    [(verdict, id)] = rows(live, begun)
    assert verdict == "send" and rows(live, begun) == [("wait", None)]
    live.advance("1m")
    assert rows(live, "select anton.lapse_calls()") == [(1,)]
    assert rows(live, "select count(*) from anton.memo") == [(0,)]
    ended = text({"id": id, "state": "done", "ttl": 60, "answer": {"text": "late"}, "quota": "q", "limits": []})
    rows(live, f"select anton.end_calls('{ended}')")
    assert rows(live, begun) == [("answer", id)]


async def test_a_call_that_was_granted_when_its_asker_was_cancelled_is_given_back(db):
    bench = await Bench.make(db, lambda: Table("a"))
    ledger = ledger_of(db)
    asking = asyncio.create_task(ledger.begin(CALL))
    await asyncio.sleep(0)
    [(_, granted)] = ledger._begins._waiting
    await met(granted.done, pause=0)
    assert granted.result().verdict == "send"
    asking.cancel()                                                    # before it runs again
    with pytest.raises(asyncio.CancelledError):
        await asking
    await bench.until("select not exists (select from anton.call)")


def test_tries_end_before_the_handlers_time_and_blame_no_record(live, llm):
    declare(live, openai(llm, timeout=60), timeout="4s", attempts=1)
    llm.script("hang", "hang")
    ask(live, "hi")
    assert not live.dead
    assert "no answer in 2 s of tries" in rows(live, "select failing_error from anton.handler")[0][0]
    assert rows(live, "select distinct state from anton.call") == [("unknown",)]


def test_a_password_in_an_address_is_shown_nowhere(app, llm):
    with declaring(app.app):
        made = openai(llm, base_url="https://me:hunter2@models.example/v1")(Table("answers"))
    assert "hunter2" not in repr(made) and made.host == "models.example"


# Memo


def test_equal_questions_are_asked_once(live, llm):
    declare(live, openai(llm), concurrency=100)
    llm.delay = 0.05
    ask(live, *["the same"] * 200)
    assert len(llm.asked) == 1 and len(live.records("answers")) == 200
    assert sorted({answer["cost"] for answer in live.records("answers")}) == [0.0, 0.008]
    assert rows(live, "select memo, count(*) from anton.answer group by 1 order by 1") == [(False, 1), (True, 199)]
    assert rows(live, "select calls, memo from anton.list_costs(1)") == [(1, 199)]


def test_a_memo_ends_after_its_time_and_false_shares_nothing(live, llm):
    declare(live, openai(llm, memo="1h"))
    ask(live, "hi")
    live.advance("59m")
    ask(live, "hi")
    assert len(llm.asked) == 1
    live.advance("2m")
    ask(live, "hi")
    assert len(llm.asked) == 2


def test_without_a_memo_each_record_is_asked_for_itself(live, llm):
    declare(live, openai(llm, memo=False))
    ask(live, "hi", "hi", "hi")
    assert len(llm.asked) == 3


@pytest.mark.parametrize("other", [{"temperature": 0.1}, {"model": "n"}, {"max_tokens": 5},
                                   {"system": "be kind to all"}, {"output": Triage}])
def test_another_model_parameter_or_output_is_another_question(other, live, llm):
    llm.answer = lambda prompt: '{"kind": "bug", "urgent": true}'
    with declaring(live.app):
        asked, answers = Table("asked"), Table("answers")
        asked.on_new_records(openai(llm)(answers), name="one")
        asked.on_new_records(openai(llm, **other)(answers), name="other")
    live.migrate()
    ask(live, "hi")
    assert len(llm.asked) == 2


KILLED = """
import asyncio, sys
sys.path[:0] = ["tests", "components"]
from anton import Table
from anton.action import set_effects
from anton.app import App, declaring
from anton.db import Database, set_database
from anton.worker import Worker
from anton_components.vendor.openai.cognition import OpenAiCompletion
dsn, name, url = sys.argv[1:]
db = Database(dsn)
set_database(db)
set_effects("live")
with declaring(App(name)) as app:
    Table("asked").on_new_records(OpenAiCompletion(
        Table("answers"), api_key="sk-good", model="m", base_url=url, max_tokens=10, budget="1 USD/day",
        price={"input": "1000", "output": "2000"}))
    asyncio.run(Worker(db, app).run_until_idle())
"""


@pytest.mark.parametrize("odd", [12.5, -1, 10**30, True])
def test_an_odd_count_of_tokens_is_not_known_and_charged_at_the_most(odd, live, llm):
    declare(live, openai(llm, max_tokens=10, budget="1 USD/day"))
    llm.usage = {"prompt_tokens": odd}
    ask(live, "hi")
    assert len(live.records("answers")) == 1 and not live.dead
    state, cost, reserved = rows(live, "select state, cost, reserved from anton.call")[0]
    held = rows(live, "select settled, reserved from anton.spent")
    assert state == "done" and held == [(cost if odd is True else reserved, Decimal(0))]


@pytest.mark.parametrize("said", [None, {"completion_tokens": None}])
@pytest.mark.parametrize("of", ["openai", "anthropic"])
def test_a_service_that_says_nothing_of_tokens_is_charged_at_the_most_and_flagged(of, said, live, llm):
    declare(live, (openai if of == "openai" else anthropic)(llm, max_tokens=10, budget="1 USD/day"))
    llm.silent, llm.usage = said is None or of == "anthropic", said or {}
    ask(live, "hi")
    (answer,) = live.records("answers")
    assert (answer["usage"], answer["cost"]) == (None, None) and not live.dead
    ((reserved, cost),) = rows(live, "select reserved, cost from anton.call")
    assert cost is None and rows(live, "select settled from anton.spent") == [(reserved,)]
    assert rows(live, "select unpriced from anton.list_costs(1)") == [(1,)]


USED = {"prompt_tokens": 3, "completion_tokens": 4, "input_tokens": 3, "output_tokens": 4}


PAID = Decimal("0.011")
NO_ANSWERS: list[tuple[Any, Any]] = [                                  # what came; what it cost, None: nobody knows
    (b'{"choices": [{"message"', None), (b'"so be it"', None), ({"choices": []}, None), ({"choices": [None]}, None),
    ({"choices": {}, "content": {}, "usage": [1]}, None), ({"choices": [], "content": None, "usage": USED}, PAID),
    ({"choices": [{"finish_reason": ["stop"]}], "content": [7], "usage": USED}, PAID)]


@pytest.mark.parametrize("of, output", [("openai", None), ("openai", Triage), ("anthropic", None)])
def test_what_is_no_answer_is_a_dead_letter_with_what_came_and_is_asked_and_charged_once(of, output, live, llm):
    morning(live)
    declare(live, (openai if of == "openai" else anthropic)(llm, max_tokens=10, budget="50 USD/day", output=output))
    for number, (said, _) in enumerate(NO_ANSWERS):
        llm.raw = [said]
        ask(live, f"hi {number}")
    raw = [said.decode() if isinstance(said, bytes) else json.dumps(said, separators=(",", ":"))
           for said, _ in NO_ANSWERS]
    assert [text for text, dead in zip(raw, live.dead, strict=True)
            if text not in dead.error and text.replace(",", ", ").replace(":", ": ") not in dead.error] == []
    calls = rows(live, "select state, cost, reserved from anton.call order by id")
    assert [(state, cost) for state, cost, _ in calls] == [
        ("unknown" if cost is None else "done", cost) for _, cost in NO_ANSWERS]
    held = sum(reserved if cost is None else cost for _, cost, reserved in calls)
    assert rows(live, "select settled, reserved from anton.spent") == [(held, Decimal(0))]
    assert rows(live, "select count(*) from anton.memo") == [(0,)] and not live.records("answers")


def test_a_page_of_a_gateway_blames_no_record(live, llm):
    declare(live, openai(llm))
    llm.headers = {"content-type": "text/html"}
    llm.raw = [b"<html>"]
    ask(live, "hi")
    assert not live.dead and rows(live, "select state, count(*) from anton.call group by 1 order by 1") == [
        ("done", 1), ("unknown", 1)]


@pytest.mark.parametrize("usage", [
    {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1000}}, {"prompt_tokens_details": 7},
    {"prompt_tokens_details": {"cached_tokens": [1]}}, {"prompt_tokens_details": {"cached_tokens": -5}}])
def test_no_count_of_cached_tokens_makes_a_call_cheaper_than_nothing(usage, live, llm):
    declare(live, openai(llm, max_tokens=10, price={**PRICE, "cached": "1"}))
    llm.usage = usage
    ask(live, "what is it")
    ((into, cached, cost),) = rows(live, "select tokens_in, tokens_cached, cost from anton.call")
    assert cached <= into and cost >= Decimal("0.011") and len(live.records("answers")) == 1


def test_a_call_in_flight_at_a_kill_is_unknown_and_what_was_answered_is_not_paid_again(live, llm):
    morning(live)
    declare(live, openai(llm, max_tokens=10, budget="1 USD/day"))
    llm.script(*["answer"] * 3, "hang")
    live.tables["asked"].extend([{"prompt": f"q{n}"} for n in range(4)])
    child = subprocess.Popen([sys.executable, "-c", KILLED, live.db.dsn or "", live.app.name, f"{llm.url}/v1"],
                             cwd=Path(__file__).parent.parent)
    try:
        assert llm.hung.wait(60)
        while rows(live, "select count(*) from anton.call where state = 'done'") != [(3,)]:
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()
    live.advance("2m")
    assert len(llm.asked) == 5 and len(live.records("answers")) == 4 and not live.dead
    assert rows(live, "select calls, unknown from anton.list_costs(1)") == [(5, 1)]
    assert rows(live, "select state, count(*) from anton.call group by 1 order by 1") == [("done", 4), ("unknown", 1)]
    assert rows(live, "select reserved from anton.spent") == [(Decimal(0),)]


# Budgets


def test_at_its_budget_a_handler_waits_says_so_and_goes_on_in_the_next_period(live, llm):
    morning(live)
    declare(live, openai(llm, max_tokens=10, budget="1 USD/day"), concurrency=1)
    ask(live, *(f"q{n}" for n in range(200)))
    spent = rows(live, "select sum(cost) from anton.call")[0][0]
    done = len(live.records("answers"))
    assert Decimal("0.75") < spent <= 1 and 0 < done < 200 and len(llm.asked) == done and not live.dead
    state, why = rows(live, "select state, why from anton.status")[0]
    assert state == "failing" and "of 1 usd/day are spent by handler OpenAiCompletion" in why and "raise budget=" in why
    assert rows(live, "select state, error ~ '^its handler waits: BudgetReached: .* of 1 usd/day' from "
                      "anton.why('asked', '200') where level > 0") == [("ready", True)]
    live.advance("1d")
    assert done < len(live.records("answers"))
    assert rows(live, "select bool_and(settled <= 1 and reserved = 0), count(*) from anton.spent") == [(True, 2)]


def test_a_handler_that_waits_for_a_budget_that_was_raised_goes_on_when_it_is_resumed(live, llm):
    morning(live)
    declare(live, openai(llm, max_tokens=10, budget="1 USD/day"), concurrency=1)
    ask(live, *(f"q{n}" for n in range(200)))
    done = len(live.records("answers"))
    rows(live, "update anton.budget set amount = 100")
    live.run()
    assert len(live.records("answers")) == done
    rows(live, "select anton.resume('OpenAiCompletion')")
    live.run()
    assert len(live.records("answers")) == 200 and not live.dead


def test_a_call_that_its_whole_budget_cannot_pay_is_a_dead_letter_and_holds_up_no_other(live, llm):
    morning(live)
    llm.answer = lambda prompt: "yes"
    declare(live, openai(llm, max_tokens=10, budget="1 USD/day"))
    ask(live, "long " * 200, "hi")
    assert [answer["prompt"] for answer in live.records("answers")] == ["hi"] and len(llm.asked) == 1
    (dead,) = live.dead
    assert dead.reason == "discarded" and dead.error.startswith("OpenAI (m): ")
    assert "of 1 usd/day are spent" in dead.error and "which is more than all of it" in dead.error
    assert rows(live, "select count(*) from anton.call") == [(1,)]
    assert rows(live, "select reserved from anton.spent") == [(Decimal(0),)]
    rows(live, "update anton.budget set amount = 2")
    rows(live, "select anton.replay(id) from anton.dead")
    live.run()
    assert len(live.records("answers")) == 2 and not live.dead


def test_what_calls_in_flight_may_cost_is_held_back(live, llm):
    morning(live)
    llm.delay = 0.05
    declare(live, openai(llm, max_tokens=400, budget="1 USD/day"), concurrency=20)   # at most 0.95 or so each
    ask(live, "a", "b", "c")
    assert len(llm.asked) == 3 and len(live.records("answers")) == 3 and llm.most == 1


def test_a_budget_in_tokens_needs_no_price(live, llm):
    morning(live)
    declare(live, openai(llm, price=None, max_tokens=10, budget="300 tokens/day"), concurrency=1)
    ask(live, *(f"q{n}" for n in range(200)))
    tokens = rows(live, "select sum(tokens_in + tokens_out) from anton.call")[0][0]
    assert rows(live, "select settled from anton.spent") == [(Decimal(tokens),)] and 100 < tokens <= 300
    assert 0 < len(live.records("answers")) < 200 and not live.dead


def test_the_scopes_of_budgets_are_apart(live, llm):
    morning(live)
    with declaring(live.app):
        asked, answers = Table("asked"), Table("answers")
        several = ["10 USD", "1 USD/month per app", "9000 tokens/hour per table"]
        for name, budget in (("one", "10 USD"), ("two", several)):
            asked.on_new_records(openai(llm, max_tokens=5, budget=budget)(answers), name=name)
    live.migrate()
    ask(live, "hi")
    paid = rows(live, "select handler, tokens_in + tokens_out, cost from anton.call")
    assert len(paid) == 1 and len(llm.asked) == 1                      # the other one got it from memo
    spent = {(scope, name): settled for scope, name, settled in rows(
        live, "select scope, name, settled from anton.list_budgets()")}
    handler, tokens, cost = paid[0]
    wide = handler == "two"
    assert spent == {("handler", "one"): 0 if wide else cost, ("handler", "two"): cost if wide else 0,
                     ("app", ""): cost if wide else 0, ("table", "asked"): tokens if wide else 0}


@pytest.mark.parametrize("options, why", [
    ({"budget": "5 USD/day"}, "max_tokens="), ({"budget": "5 USD/day", "max_tokens": 9, "price": None}, "price="),
    ({"budget": "5"}, "5 USD/day"), ({"limit": "fast"}, "requests/min"), ({"max_tokens": 0}, "whole number"),
    ({"output": dict}, "Pydantic"), ({"mode": "magic"}, "schema"), ({"model": []}, "a name"),
    ({"context": {"x": sql("select 1")}}, "prompt="), ({"context": {"x": "select 1"}, "prompt": "{x} y"}, "sql"),
    ({"prompt": "gone.md"}, "a file in"), ({"memo": "soon"}, "30s")])
def test_what_cannot_be_is_refused_when_it_is_declared(options, why, app, llm):
    with declaring(app.app), pytest.raises(BadOption, match=why):
        openai(llm, **options)(Table("t"))


def test_the_components_of_a_table_agree_on_its_budget(app):
    def one(amount: str) -> OpenAiCompletion:
        return OpenAiCompletion(answers, model="m", price=PRICE, max_tokens=9, budget=amount)

    with declaring(app.app):
        asked, answers = Table("asked"), Table("answers")
        asked.on_new_records(one("5 USD/day per table"), name="one")
        Table("other").on_new_records(one("6 USD/day per table"))
        with pytest.raises(BadOption, match=r'Allowed: 5, as .* table "asked" has one amount'):
            asked.on_new_records(one("6 USD/day per table"), name="two")
        with pytest.raises(BadOption, match="one amount of a unit"):
            one(["5 USD/day", "3 USD/day"])  # type: ignore[arg-type]


def test_a_record_that_is_too_long_takes_no_schema_from_the_others(live, llm):
    llm.answer = lambda prompt: '{"kind": "bug"}'
    declare(live, openai(llm, output=Triage), attempts=1)
    llm.script((400, {}, "This model's maximum context length is 9 tokens: messages and response_format are too long.",
                "context_length_exceeded"))
    ask(live, "much")
    ask(live, "hi")
    assert len(live.dead) == 1 and all("response_format" in body for body in llm.asked)


def test_the_components_of_an_app_agree_on_its_budget(app):
    with declaring(app.app):
        OpenAiCompletion(Table("a"), model="m", price=PRICE, max_tokens=9, budget="5 USD/day per app")
        OpenAiCompletion(Table("b"), model="m", price=PRICE, max_tokens=9, budget="$5/day per app")
        with pytest.raises(BadOption, match=r"Allowed: 5, as OpenAiCompletion \(.*py:\d+\) says"):
            OpenAiCompletion(Table("c"), model="m", price=PRICE, max_tokens=9, budget="6 USD/day per app")


def test_an_unknown_option_says_what_was_meant(app):
    with declaring(app.app), pytest.raises(UnknownOption, match='Did you mean "temperature"'):
        OpenAiCompletion(Table("t"), temprature=1)  # type: ignore[call-arg]


# Limits


def windows(llm: Llm, seconds: float) -> int:
    """The most requests that arrived in any window."""
    times = [at for at, _ in llm.arrived]
    return max(sum(1 for other in times if at <= other < at + seconds) for at in times)


def test_no_window_holds_more_requests_than_the_stated_limit(live, llm):
    declare(live, openai(llm, limit="50 requests/s"))
    ask(live, *(f"q{n}" for n in range(75)))
    assert windows(llm, 1.0) <= 50 and len(llm.arrived) == 75


def test_a_limit_is_learnt_and_a_429_holds_everybody_back(live, llm):
    llm.headers = {"x-ratelimit-limit-requests": "6000"}
    declare(live, openai(llm))
    llm.script((429, {"retry-after": "0.3"}))
    ask(live, "a", "b")
    assert rows(live, "select unit, amount, stated, blocked_until is not null from anton.quota") == [
        ("requests", Decimal(6000), False, True)]
    assert len(live.records("answers")) == 2


@pytest.mark.parametrize("said", ["600", "date"])
def test_a_long_retry_after_makes_the_handler_wait_and_blames_no_record(said, live, llm):
    declare(live, openai(llm))
    llm.script((429, {"retry-after": format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)
                      if said == "date" else said}))
    ask(live, "a")
    assert len(llm.asked) == 1 and not live.dead
    live.advance("9m")
    assert len(llm.asked) == 1
    live.advance("3m")
    assert len(live.records("answers")) == 1


# Context


def test_context_is_in_the_prompt_and_its_rows_are_told_by_why(live, llm):
    with declaring(live.app):
        asked, answers, facts = Table("asked"), Table("answers"), Table("facts")
        found = sql("select data ->> 'text' from facts f where f.data ->> 'about' = {about} order by id")
        asked.on_new_records(openai(llm, prompt="Given:\n{facts}\nanswer {prompt}", context={"facts": found})(answers))
        answers.on_new_records(lambda records: None, name="reads")
    live.migrate()
    facts.extend([{"about": "x", "text": "one"}, {"about": "x", "text": "two"}, {"about": "y", "text": "three"}])
    ask(live, "why", about="x")
    assert llm.asked[0]["messages"][-1]["content"] == "Given:\n- one\n- two\nanswer why"
    ((context, version),) = rows(live, "select context, prompt_version from anton.answer")
    assert [(table, key) for table, key, _ in context["facts"]] == [("facts", [1]), ("facts", [2])]
    assert len(version) == 8
    receipt = rows(live, "select receipt_id from anton.why('answers', '1') where receipt_id is not null limit 1")[0][0]
    assert rows(live, f"select record, model, memo from anton.thoughts(array[{receipt}])") == [
        ("asked/1", "m-2026-03-17", False)]


# Fallback


@pytest.mark.parametrize("failures", [(404,), (500, 500, 500), ((429, {"retry-after": "60"}),)])
def test_the_next_model_is_asked_when_one_is_busy_down_or_gone(failures, live, llm):
    declare(live, openai(llm, model=["m", "n"]))
    llm.script(*failures)
    ask(live, "hi")
    (answer,) = live.records("answers")
    assert answer["model"] == "n-2026-03-17" and {body["model"] for body in llm.asked} == {"m", "n"}


def test_a_rows_cost_is_its_answers_and_calls_that_were_lost_are_in_the_ledger_alone(live, llm):
    declare(live, openai(llm, model=["m", "n"], max_tokens=10))
    llm.script((502, {"retry-after": "60"}))                           # one try, and no jitter
    ask(live, "what is it")
    (answer,) = live.records("answers")
    assert (answer["model"], answer["cost"]) == ("n-2026-03-17", 0.011)
    ((lost,),) = rows(live, "select sum(reserved) from anton.call where state = 'unknown'")
    costs = rows(live, "select model, calls, unknown, cost from anton.list_costs(1) order by model")
    assert costs == [("m", 1, 1, lost), ("n", 1, 0, Decimal("0.011"))]


# Structured output


@pytest.mark.parametrize("takes", [("schema", "tool"), ("tool",), ()])
def test_a_structured_answer_is_asked_for_as_the_server_can(takes, live, llm):
    llm.takes = takes
    llm.answer = lambda prompt: '{"kind": "bug", "urgent": true}'
    declare(live, openai(llm, output=Triage, prompt="Triage: {prompt}"))
    ask(live, "it crashes", "it burns")
    answers = live.records("answers")
    assert [(answer["kind"], answer["urgent"]) for answer in answers] == [("bug", True)] * 2
    assert len(llm.asked) == 2 and not live.dead                       # found out once
    assert ("JSON Schema" in llm.asked[0]["messages"][-1]["content"]) is (takes == ())


def test_an_answer_that_does_not_fit_is_mended_once(live, llm):
    replies = iter(['{"kind": "rant"}', '{"kind": "question"}'])
    llm.answer = lambda prompt: next(replies)
    declare(live, openai(llm, output=Triage))
    ask(live, "hm")
    assert live.records("answers")[0]["kind"] == "question"
    said = [message["content"] for message in llm.asked[1]["messages"]]
    assert said[1] == '{"kind": "rant"}' and "kind: Input should be" in said[2]


def test_one_that_stays_unfit_is_a_dead_letter_with_the_raw_text_and_is_asked_again_when_replayed(live, llm):
    llm.answer = lambda prompt: "no idea"
    declare(live, openai(llm, output=Triage))
    ask(live, "hm")
    (dead,) = live.dead
    assert dead.reason == "discarded" and "It was: no idea" in dead.error and len(llm.asked) == 2
    llm.answer = lambda prompt: '{"kind": "bug"}'
    rows(live, "select anton.replay(id) from anton.dead")
    live.run()
    assert live.records("answers")[0]["kind"] == "bug" and not live.dead


def test_one_that_was_cut_off_is_not_asked_for_again(live, llm):
    llm.answer = lambda prompt: '{ "kind": "bug", "urgent": true }'
    declare(live, openai(llm, output=Triage, max_tokens=3))
    ask(live, "hm")
    assert "cut off at max_tokens=3" in live.dead[0].error and len(llm.asked) == 1


def test_a_plain_answer_that_was_cut_off_is_a_dead_letter_and_asked_again_when_replayed(live, llm):
    declare(live, openai(llm, max_tokens=1))
    ask(live, "hm")
    assert "cut off at max_tokens=1. It was: re:" in live.dead[0].error and not live.records("answers")
    assert rows(live, "select count(*) from anton.memo") == [(0,)]


class Ticket(BaseModel):
    id: int | None = None
    prompt: str
    kind: Literal["bug", "question"]
    customer: str


def test_a_table_with_a_model_gets_its_fields_typed_and_carried_over(live, llm):
    llm.answer = lambda prompt: '{"kind": "bug", "urgent": true}'
    declare(live, openai(llm, output=Triage), model=Ticket)
    ask(live, "it crashes", customer="ann")
    (ticket,) = live.records("answers")
    assert (ticket.kind, ticket.customer, ticket.prompt) == ("bug", "ann", "it crashes")


def test_without_a_key_a_structured_answer_is_made_up_and_tests_say_what_it_is(app):
    declare(app, lambda to: OpenAiCompletion(to, output=Triage), model=Ticket)
    app.model.reply(Triage(kind="question"), '{"kind": "question"}')
    ask(app, "a", "b", "c", customer="ann")
    assert [ticket.kind for ticket in app.records("answers")] == ["question", "question", "bug"]


# Anthropic


def anthropic(llm: Llm, **options: Any) -> Callable[[Any], AnthropicCompletion]:
    return lambda to: AnthropicCompletion(to, **{"api_key": "sk-good", "model": "c", "base_url": llm.url,
                                                 "price": PRICE, **options})


@pytest.mark.parametrize("takes", [("schema", "tool"), ("tool",)])
def test_anthropic_is_asked_in_its_own_words(takes, live, llm):
    llm.takes = takes
    llm.answer = lambda prompt: '{"kind": "bug", "urgent": false}'
    declare(live, anthropic(llm, output=Triage, system="Be brief, always.", budget="9 USD/day", max_tokens=50))
    ask(live, "it crashes")
    (answer,) = live.records("answers")
    assert (answer["kind"], answer["model"], answer["usage"]) == ("bug", "c-20260101", {"input": 5, "output": 4})
    assert llm.asked[-1]["system"] == "Be brief, always." and llm.asked[-1]["max_tokens"] == 50
    assert rows(live, "select provider, state, cost from anton.call where state = 'done'") == [
        ("Anthropic", "done", Decimal("0.013"))]


@pytest.mark.parametrize("status, dead", [(400, True), (401, False), (402, False), (429, False), (529, False)])
def test_what_anthropic_answers_is_the_records_fault_or_the_worlds(status, dead, live, llm):
    declare(live, anthropic(llm), attempts=1)
    llm.script(*[status] * 3)
    ask(live, "hi")
    assert bool(live.dead) is dead and not live.records("answers")


def test_an_empty_account_at_anthropic_blames_no_record(live, llm):
    declare(live, anthropic(llm), attempts=1)
    llm.script((400, {}, "Your credit balance is too low to access the Anthropic API."))
    ask(live, "hi")
    assert not live.dead and "credit balance" in rows(live, "select failing_error from anton.handler")[0][0]


# FakeModel


def test_an_answer_that_no_text_can_hold_costs_its_neighbours_nothing(app):
    declare(app, lambda to: FakeModel(to, answer=lambda prompt: prompt + "\0\ud800" if prompt == "odd" else prompt))
    ask(app, "odd", *(f"q{n}" for n in range(20)))
    assert {row["completion"] for row in app.records("answers")} == {"odd\ufffd\ufffd", *(f"q{n}" for n in range(20))}
    assert rows(app, "select state, count(*) from anton.call group by 1") == [("done", 21)] and not app.dead


def test_a_fake_model_is_asked_as_a_real_one_and_leaves_nothing_out(app):
    async def shout(prompt: str) -> str:
        await asyncio.sleep(0)
        return prompt.upper()

    declare(app, lambda to: FakeModel(to, answer=shout, budget="1 USD/day", max_tokens=10))
    ask(app, "hi", "hi")
    assert [answer["completion"] for answer in app.records("answers")] == ["HI", "HI"]
    assert rows(app, "select provider, cost from anton.call") == [("Fake", Decimal(0))]


def test_a_mistake_of_a_model_function_is_the_records_and_its_call_is_no_open_one(app):
    declare(app, lambda to: FakeModel(to, answer=lambda prompt: 1 / 0), attempts=1)
    ask(app, "hi")
    assert "ZeroDivisionError" in app.dead[0].error
    app.run()
    assert rows(app, "select count(*) from anton.call where state = 'asking'") == [(0,)]


# anton costs


def test_costs_are_shown_and_settled_on_the_command_line(live, llm, capsys):
    morning(live)
    made = declare(live, openai(llm, max_tokens=10, budget="10 USD/day"))
    llm.script("answer", "hang", "hang", "hang")
    ask(live, "one")
    made.timeout = 0.2                                                 # what is answered was so in time
    ask(live, "two")

    def anton(*words: str) -> tuple[int, Any]:
        code = main([*words, "--database", live.db.dsn or "", "--json"])
        return code, json.loads(capsys.readouterr().out)

    code, (line,) = anton("costs", "list")
    assert code == 0 and (line["calls"], line["unknown"], line["handler"]) == (4, 3, "OpenAiCompletion")
    ids = [call["id"] for call in anton("costs", "calls", "--state", "unknown")[1]]
    assert anton("costs", "settle", *map(str, ids), "--cost", "0.25") == (0, {"settled": ids})
    assert anton("costs", "settle", str(ids[0]))[0] == 1
    assert anton("costs", "show", str(ids[0]))[1]["cost"] == 0.25
    (budget,) = anton("costs", "budgets")[1]
    assert budget["settled"] > 0.75 and budget["reserved"] == 0
