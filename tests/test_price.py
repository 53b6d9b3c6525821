"""Price: what calls cost, from a table; what is not known is none. Limits and budgets as apps state them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime

import pytest
from anton_components.vendor.anthropic.cognition import AnthropicCompletion
from anton_components.vendor.openai.cognition import OpenAiCompletion
from hypothesis import given
from hypothesis import strategies as st

from anton.errors import BadOption
from anton.ledger import budgets_of
from anton.limit import Limit, learnt, limits_of, retry_after
from anton.memo import hash_of
from anton.price import Price, Prices

TABLE = OpenAiCompletion.prices


def test_a_call_costs_what_its_tokens_cost():
    price = Price.of({"input": "0.75", "output": "4.5", "cached": "0.075"})
    assert price.cost(1_000_000, 0) == Decimal("0.75")
    assert price.cost(1000, 200) == Decimal("0.00165")
    assert price.cost(1000, 0, cached=1000) == Decimal("0.000075")


def test_above_a_tier_all_tokens_cost_more():
    price = Price.of({"input": [[0, "1"], [1000, "2"]], "output": [[0, "4"], [1000, "8"]]})
    assert price.cost(999, 1) == Decimal("0.001003") and price.cost(1000, 1) == Decimal("0.002008")
    assert price.most(10, 1) == Decimal("0.000028")


@pytest.mark.parametrize("model, known", [
    ("gpt-5.4-mini", True), ("gpt-5.4-mini-2026-03-17", True), ("ft:gpt-4o-mini-2024-07-18:org::id", True),
    ("gpt-5.4-minimal", False), ("my-own", False), ("text-embedding-3-small", False)])
def test_a_model_is_found_under_its_dated_names_and_no_other_is_guessed(model, known):
    assert (TABLE.find(model) is not None) is known


@pytest.mark.parametrize("prices", [OpenAiCompletion.prices, AnthropicCompletion.prices], ids=["openai", "anthropic"])
def test_every_price_of_the_tables_can_be_read_and_is_above_nothing(prices):
    found = [prices.find(model) for model, price in prices.models.items() if "output" in price]
    assert all(price is not None and price.cost(1000, 1000) > 0 for price in found) and len(found) > 20
    assert AnthropicCompletion.prices.find("claude-haiku-4-5-20251001") is not None


@given(st.integers(0, 2_000_000), st.integers(0, 100_000), st.floats(0, 1), st.floats(0, 1),
       st.sampled_from(sorted(name for name, price in TABLE.models.items() if "output" in price)))
def test_no_call_costs_more_than_was_reserved_for_it(tokens_in, tokens_out, cached, written, model):
    price = TABLE.find(model)
    assert price is not None
    first = int(tokens_in * cached)
    second = int((tokens_in - first) * written)
    assert 0 <= price.cost(tokens_in, tokens_out, first, second) <= price.most(tokens_in, tokens_out)


@pytest.mark.parametrize("wrong", [{"input": 1}, {"input": 1, "output": 2, "audio": 3}, {"input": "x", "output": 1},
                                   {"input": -1, "output": 1}, {"input": "NaN", "output": 1}])
def test_a_price_that_is_none_is_refused(wrong):
    with pytest.raises(BadOption, match="dollars for a million tokens"):
        Price.of(wrong)


def test_a_table_without_a_model_knows_no_price():
    assert Prices().find("gpt-5.4-mini") is None


@pytest.mark.parametrize("text, amount, unit, period, scope", [
    ("5 USD/day", "5", "usd", "day", "handler"), ("$1.50/month per app", "1.50", "usd", "month", "app"),
    ("100_000 tokens/hour per table", "100000", "tokens", "hour", "table"), ("10 usd", "10", "usd", "total", "handler"),
    ("0 tokens / week", "0", "tokens", "week", "handler")])
def test_a_budget_is_an_amount_in_a_period(text, amount, unit, period, scope):
    (budget,) = budgets_of(text, "X")
    assert (budget.amount, budget.unit, budget.period, budget.scope) == (Decimal(amount), unit, period, scope)


@pytest.mark.parametrize("text", ["5", "USD 5", "5 USD/year", "-5 USD/day", "5 EUR/day", "", 5, "5 USD per user"])
def test_a_budget_that_is_none_is_refused_with_what_would_be_one(text):
    with pytest.raises(BadOption, match=r"5 USD/day"):
        budgets_of([text], "X")


def test_limits_are_numbers_in_a_time():
    assert limits_of("600 requests/min, 100_000 tokens/min", "X") == (Limit("requests", 600), Limit("tokens", 100_000))
    assert limits_of("10 requests/s", "X") == (Limit("requests", 10, 1.0),)
    assert limits_of("50 requests/10 seconds", "X") == (Limit("requests", 50, 10.0),)
    assert limits_of(None, "X") == ()


@pytest.mark.parametrize("text", ["fast", "0 requests/min", "5 requests", "5 requests/min, 6 requests/min", 7])
def test_a_limit_that_is_none_is_refused(text):
    with pytest.raises(BadOption, match="requests/min"):
        limits_of(text, "X")


def test_limits_are_learnt_from_headers():
    assert learnt({"x-ratelimit-limit-requests": "500", "x-ratelimit-limit-tokens": "n/a"}) == (Limit("requests", 500),)
    assert learnt({"anthropic-ratelimit-tokens-limit": "80000"}) == (Limit("tokens", 80000),)


@pytest.mark.parametrize("limit, remaining, reset, known", [
    ("10000", "9999", "8.64s", False), ("14400", "14370", "2m59.56s", False), ("200", "0", "24h0m0s", False),
    ("500", "499", "120ms", True), ("500", "0", "1m0s", True), ("500", "500", "0s", True), ("500", "499", "soon", True),
    ("500", "", "8.64s", True)])
def test_what_a_service_counts_by_the_day_is_no_limit_of_a_minute(limit, remaining, reset, known):
    headers = {"x-ratelimit-limit-requests": limit, "x-ratelimit-remaining-requests": remaining,
               "x-ratelimit-reset-requests": reset}
    assert learnt(headers) == ((Limit("requests", int(limit)),) if known else ())


def test_retry_after_is_seconds_or_a_date_and_nothing_else():
    assert retry_after({"retry-after": "2"}) == 2.0 and retry_after({"retry-after-ms": "250"}) == 0.25
    assert retry_after({"retry-after": "999999999"}) == 86400.0 and retry_after({"retry-after-ms": "nan"}) == 0.0
    at = format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)
    assert 200 < (retry_after({"retry-after": at}) or 0) <= 300
    assert [retry_after({"retry-after": text}) for text in ("", "soon", "-3")] == [None, None, None]


def test_equal_questions_have_one_hash():
    assert hash_of({"a": 1, "b": [2]}, "x") == hash_of({"b": [2], "a": 1}, "x") != hash_of({"a": 1, "b": [2]}, "y")
