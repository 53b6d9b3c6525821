"""Tuning: runs as rows, against a service with files and jobs over a real socket, and what an alias then means."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import orjson
import pytest
from anton_components.vendor.openai.cognition import OpenAiCompletion
from anton_components.vendor.openai.tuning import OpenAiFineTune
from llm import Llm
from peers import served
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from working import morning

from anton import Approval, Table, action, sql
from anton import tuning as tunings
from anton.app import declaring
from anton.cli import main
from anton.errors import BadOption, Miswired, UnknownOption

GOOD = sql("select data ->> 'prompt' as prompt, data ->> 'reply' as completion from rated "
           "where (data ->> 'rating')::int > 0 order by id")


class Service(Llm):
    """Files and tuning jobs besides completions. jobs: as made. die: the connection breaks once a job was made."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, list[Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.down = False
        self.looks = 0
        self._ids = itertools.count(1)

    async def file(self, request: Request) -> Response:
        if request.headers.get("authorization") != "Bearer sk-good":
            return JSONResponse({"error": {"message": "Incorrect API key provided"}}, 401)
        async with request.form() as form:
            if set(form) != {"purpose", "file"} or form["purpose"] != "fine-tune" or not form["file"].filename.endswith(
                    ".jsonl"):
                return JSONResponse({"error": {"message": "wrong form"}}, 400)
            lines = [json.loads(line) for line in (await form["file"].read()).splitlines()]
        if any(line["messages"][-1]["role"] != "assistant" for line in lines):
            return JSONResponse({"error": {"message": "the last message must be the assistant's"}}, 400)
        id = f"file-{next(self._ids)}"
        self.files[id] = lines
        return JSONResponse({"id": id, "object": "file", "bytes": 1, "created_at": 1, "filename": "a.jsonl",
                             "purpose": "fine-tune", "status": "processed"})

    async def make(self, request: Request) -> Response:
        body = await request.json()
        epochs = body.get("method", {"supervised": {"hyperparameters": {"n_epochs": 1}}})
        known = {"training_file", "model", "suffix", "metadata", "method"}
        if set(body) - known or not 1 <= epochs["supervised"]["hyperparameters"]["n_epochs"] <= 50 or (
                body["training_file"] not in self.files):
            return JSONResponse({"error": {"message": "wrong job"}}, 400)
        if body["model"] == "none":
            return JSONResponse({"error": {"message": "model none cannot be tuned"}}, 400)
        id = f"ftjob-{next(self._ids)}"
        self.jobs[id] = {"id": id, "object": "fine_tuning.job", "created_at": 1, "status": "validating_files",
                         "hyperparameters": {}, "organization_id": "o", "result_files": [], "seed": 1, **body}
        if self.down:
            return JSONResponse({"error": {"message": "gateway"}}, 502)
        return JSONResponse(self.jobs[id])

    async def list(self, request: Request) -> Response:
        wanted = request.query_params.get("metadata[anton]")
        found = [job for job in self.jobs.values() if job["metadata"]["anton"] == wanted]
        return JSONResponse({"object": "list", "data": found, "has_more": False})

    async def job(self, request: Request) -> Response:
        self.looks += 1
        if self.down:
            return JSONResponse({"error": {"message": "down"}}, 503)
        return JSONResponse(self.jobs[request.path_params["id"]])

    def end(self, status: str, **more: Any) -> None:
        """The newest job is over."""
        self.jobs[list(self.jobs)[-1]] |= {"status": status, "trained_tokens": 99, **more}


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    jobs = "/v1/fine_tuning/jobs"
    with served(Route("/v1/chat/completions", service.openai, methods=["POST"]),
                Route("/v1/files", service.file, methods=["POST"]), Route(jobs, service.make, methods=["POST"]),
                Route(jobs, service.list), Route(jobs + "/{id}", service.job),
                ending=service.ended.set) as service.url:
        yield service


@pytest.fixture
def live(live, monkeypatch):
    monkeypatch.setattr(tunings, "FRESH", 0.0)                         # an alias is looked up each time
    return live


def declare(app: Any, service: Service, **options: Any) -> OpenAiFineTune:
    there = {"api_key": "sk-good", "base_url": f"{service.url}/v1"}
    with declaring(app.app):
        Table("rated")
        tune = OpenAiFineTune("replies", examples=GOOD, **{"model": "base", "least": 2, **there, **options})
        Table("asked").on_new_records(OpenAiCompletion(Table("answers"), model="alias:replies", memo=False, **there))
    app.migrate()
    app.tables["rated"].extend([{"prompt": "hi", "reply": "hello!", "rating": 1}, {"prompt": "lunch?", "reply": "soup",
                                "rating": 2}, {"prompt": "no", "reply": "bad", "rating": -1}])
    return tune


def run(app: Any, tune: OpenAiFineTune) -> None:
    tune.run()
    app.run()


def asked_of(app: Any, service: Service) -> str:
    """Which model answers now."""
    app.tables["asked"].append({"prompt": "x"})
    app.run()
    model: str = service.asked[-1]["model"]
    return model


def last(app: Any) -> Any:
    return app.records("tunings")[-1]


def test_what_was_approved_is_learnt_and_the_alias_means_what_came_of_it(live, service):
    tune = declare(live, service, system="Be brief.")
    assert asked_of(live, service) == "base"
    run(live, tune)
    assert [line["messages"] for line in service.files["file-1"]] == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt},
         {"role": "assistant", "content": reply}] for prompt, reply in (("hi", "hello!"), ("lunch?", "soup"))]
    row = last(live)
    assert (row.state, row.examples, row.file, row.job, row.base) == ("running", 2, "file-1", "ftjob-2", "base")
    live.advance("5m")
    assert last(live).state == "running" and asked_of(live, service) == "base"
    service.end("succeeded", fine_tuned_model="ft:base:o:replies:1")
    live.advance("2m")
    row = last(live)
    assert (row.state, row.model, row.tokens) == ("succeeded", "ft:base:o:replies:1", 99)
    assert asked_of(live, service) == "ft:base:o:replies:1" and not live.dead
    live.tables["tunings"].select(id=row.id).update(state="retired")
    assert asked_of(live, service) == "base"


def judged(app: Any, service: Service, *decisions: str, **options: Any) -> OpenAiFineTune:
    """An app whose refunds were decided: 5 approved, 6 made 3, 7 rejected, 8 by nobody."""
    with declaring(app.app):
        complaints = Table("complaints")

        @action(approve=Approval("ann", timeout="1h"))
        def refund(amount: int) -> None: ...

        @complaints.on_new_records(each=True)
        def complain(complaint: Any) -> None:
            refund.send(amount=complaint["total"])

        tune = OpenAiFineTune("judge", model="base", least=1, examples=refund.calls.lessons(*decisions),
                              api_key="sk-good", base_url=f"{service.url}/v1", **options)
    app.migrate()
    complaints.extend({"total": total} for total in (5, 6, 7, 8))
    app.run()
    of = {one.amount: one for one in app.approvals}
    of[5].approve(by="ann")
    of[6].approve(by="ann", edit={"amount": 3})
    of[7].reject(by="ann", why="no receipt")
    app.advance("2h")
    assert {call.state for call in app.calls} == {"sent", "rejected", "expired"}
    return tune


def test_edits_and_rejections_become_examples_of_what_people_make_of_calls(live, service):
    run(live, judged(live, service, "edited", "rejected", allow_pii=True))
    lines = [[json.loads(one["content"]) for one in line["messages"]] for line in service.files["file-1"]]
    assert [(asked["action"], asked["args"], asked["record"]["data"], became) for asked, became in lines] == [
        ("refund", {"amount": 6}, {"total": 6}, {"decision": "approve", "args": {"amount": 3}}),
        ("refund", {"amount": 7}, {"total": 7}, {"decision": "reject", "why": "no receipt"})]


def test_without_words_all_that_a_person_decided_is_an_example_and_what_ran_out_is_none(live, service):
    run(live, judged(live, service, allow_pii=True))
    assert last(live).examples == 3


def test_lessons_of_calls_reach_no_model_unless_that_is_allowed(live, service):
    with pytest.raises(Miswired, match=r"lessons.*allow_pii"):
        judged(live, service)


def test_a_lesson_is_approved_edited_or_rejected(live):
    with declaring(live.app), pytest.raises(BadOption, match="refused"):
        action(name="pay")(lambda amount: None).calls.lessons("refused")


def test_a_newer_run_that_fails_leaves_the_alias_as_it_was(live, service):
    tune = declare(live, service)
    run(live, tune)
    service.end("succeeded", fine_tuned_model="ft:1")
    live.advance("2m")
    run(live, tune)
    service.end("failed", error={"code": "x", "message": "too alike", "param": None})
    live.advance("2m")
    assert (last(live).state, last(live).error) == ("failed", "too alike") and asked_of(live, service) == "ft:1"


def test_a_job_whose_answer_was_lost_is_found_and_not_paid_for_twice(live, service):
    tune = declare(live, service)
    service.down = True
    run(live, tune)
    assert last(live).state == "new" and len(service.jobs) == 1
    service.down = False
    live.advance("2m")
    assert last(live).state == "running" and len(service.jobs) == 1 and not live.dead


def test_a_service_that_is_down_while_a_job_runs_is_asked_again(live, service):
    tune = declare(live, service)
    run(live, tune)
    service.down = True
    live.advance("10m")
    assert last(live).state == "running" and not live.dead
    service.down = False
    service.end("succeeded", fine_tuned_model="ft:1")
    live.advance("10m")
    assert last(live).state == "succeeded" and not live.dead


def test_a_job_may_run_for_days(live, service):
    tune = declare(live, service, look="1h")
    run(live, tune)
    live.advance("2d")
    service.end("succeeded", fine_tuned_model="ft:1")
    live.advance("2h")
    assert last(live).state == "succeeded" and not live.dead


@pytest.mark.parametrize("options, error", [
    ({"least": 3}, "2 examples, where at least 3 are needed"), ({"model": "none"}, "model none cannot be tuned"),
    ({"examples": sql("select 'hi' as prompt, null as completion")}, "an example without completion")])
def test_a_run_that_cannot_be_says_why_and_sends_no_job(options, error, live, service):
    with declaring(live.app):
        tune = OpenAiFineTune("replies", **{"examples": sql("select 'a' as prompt, 'b' as completion union all "
                                                            "select 'c', 'd'"), "least": 2, "api_key": "sk-good",
                                            "base_url": f"{service.url}/v1", **options})
    live.migrate()
    run(live, tune)
    assert last(live).state == "failed" and error in last(live).error and not service.jobs and not live.dead


def calls(app: Any, what: str) -> list[Any]:
    return [tuple(row) for row in app._fetch(f"select {what} from {{schema}}.call where handler = 'tune_replies' "
                                             "order by id")]


def spent(app: Any) -> list[Any]:
    return [tuple(row) for row in app._fetch("select settled, reserved from {schema}.spent")]


PAID = {"price": {"input": "1000"}, "epochs": 2, "budget": "5 USD/month"}  # 0.001 a token


def test_a_job_is_a_row_of_the_ledger_reserved_before_and_settled_after(live, service, capsys):
    tune = declare(live, service, **PAID)
    run(live, tune)
    bytes = sum(len(orjson.dumps(line)) for line in service.files["file-1"])
    held = Decimal(2 * bytes) / 1000
    assert calls(live, "state, model, reserved, reserved_tokens") == [("asking", "base", held, 2 * bytes)]
    assert spent(live) == [(0, held)]
    (job,) = service.jobs.values()
    assert job["method"]["supervised"]["hyperparameters"] == {"n_epochs": 2}
    service.end("succeeded", fine_tuned_model="ft:1")
    live.advance("2m")
    assert calls(live, "id, state, answered_by, tokens_in, cost") == [
        (last(live).call, "done", "ft:1", 99, Decimal("0.099"))]
    assert spent(live) == [(Decimal("0.099"), 0)]
    capsys.readouterr()
    assert main(["costs", "list", "--json", "--database", live.db.dsn]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert (line["handler"], line["tokens_in"], float(line["cost"])) == ("tune_replies", 99, 0.099)


def test_a_job_that_its_whole_budget_cannot_pay_fails_says_so_and_sends_nothing(live, service):
    tune = declare(live, service, **{**PAID, "budget": "0.1 USD/month"})
    run(live, tune)
    assert last(live).state == "failed" and not service.jobs and not service.files and not live.dead
    assert "of 0.1 usd/month are spent by handler tune_replies, and this call can cost" in last(live).error
    assert "which is more than all of it: raise budget=" in last(live).error and spent(live) == [(0, 0)]


def test_a_job_waits_while_what_is_left_of_its_budget_cannot_pay_it(live, service):
    morning(live)
    tune = declare(live, service, **{**PAID, "budget": "0.6 USD/month"})
    run(live, tune)
    held = calls(live, "reserved")[0][0]
    assert held < Decimal("0.6") < 2 * held
    service.end("failed", trained_tokens=None)                         # charged at the most
    live.advance("2m")
    run(live, tune)
    assert last(live).state == "new" and len(service.jobs) == 1 and not live.dead
    (why,) = live._fetch("select why from {schema}.status where handler = 'tune_replies'")[0]
    assert "of 0.6 usd/month are spent by handler tune_replies, and this call can cost" in why


def test_a_run_that_is_begun_again_is_charged_once(live, service):
    morning(live)
    tune = declare(live, service, **PAID)
    service.down = True
    run(live, tune)
    service.down = False
    live.advance("2m")
    service.end("succeeded", fine_tuned_model="ft:1")
    live.advance("2m")
    assert calls(live, "state, cost") == [("done", Decimal("0.099"))] and spent(live) == [(Decimal("0.099"), 0)]


@pytest.mark.parametrize("status, tokens, state, cost, settled", [
    ("failed", None, "unknown", None, "most"), ("cancelled", 40, "done", Decimal("0.04"), Decimal("0.04")),
    ("succeeded", None, "done", None, "most")])
def test_what_a_service_does_not_say_is_charged_at_the_most_and_flagged(status, tokens, state, cost, settled, live,
                                                                        service):
    tune = declare(live, service, **PAID)
    run(live, tune)
    ((most,),) = calls(live, "reserved")
    service.end(status, trained_tokens=tokens, fine_tuned_model="ft:1" if status == "succeeded" else None)
    live.advance("2m")
    assert calls(live, "state, cost") == [(state, cost)]
    assert spent(live) == [(most if settled == "most" else settled, 0)]


def test_without_a_price_the_cost_of_a_job_is_unknown_and_says_so(live, service):
    tune = declare(live, service)
    run(live, tune)
    service.end("succeeded", fine_tuned_model="ft:1")
    live.advance("2m")
    assert calls(live, "state, tokens_in, cost") == [("done", 99, None)]
    assert [tuple(row) for row in live._fetch("select unpriced, cost from {schema}.list_costs(1)")] == [(1, None)]


@pytest.mark.parametrize("options, why", [
    ({"budget": "1 USD/day", "price": {"input": 1}}, "epochs="), ({"budget": "1 USD/day", "epochs": 1}, "price="),
    ({"epochs": 0}, "from 1 to 50")])
def test_a_budget_needs_to_know_what_a_job_can_cost(options, why, app):
    with declaring(app.app), pytest.raises(BadOption, match=why):
        OpenAiFineTune("x", examples=GOOD, **options)


def test_where_effects_are_captured_nothing_is_sent(app, service):
    tune = declare(app, service)
    run(app, tune)
    assert (last(app).state, last(app).examples) == ("captured", 2) and not service.files


def test_runs_of_one_app_are_told_apart_by_alias(live, service):
    tune = declare(live, service)
    with declaring(live.app):
        other = OpenAiFineTune("others", examples=GOOD, least=2, api_key="sk-good", base_url=f"{service.url}/v1")
    live.migrate()
    run(live, other)
    service.end("succeeded", fine_tuned_model="ft:other")
    live.advance("2m")
    assert asked_of(live, service) == "base"
    run(live, tune)
    assert [row.alias for row in live.records("tunings")] == ["others", "replies"] and len(service.jobs) == 2


def test_an_alias_of_another_app_in_the_same_database_is_another(live, service):
    declare(live, service)
    live.tables["tunings"].append({"app": "another", "alias": "replies", "base": "base"})
    live.tables["tunings"].append({"app": "another", "alias": "replies", "base": "base", "state": "succeeded",
                                    "model": "ft:theirs"})
    live.run()
    assert not service.jobs and asked_of(live, service) == "base"
    assert live.records("tunings")[0].state == "new"                  # for the workers of that app


def test_a_job_that_takes_long_is_asked_for_less_often(live, service):
    run(live, declare(live, service))
    live.advance("1h")
    often = service.looks
    live.advance("1h")
    assert (often, service.looks - often) == (60, 30)
    service.end("succeeded", fine_tuned_model="ft:slow")
    live.advance("2m")
    assert last(live).model == "ft:slow"


def test_what_cannot_be_is_refused_when_it_is_declared(app):
    with declaring(app.app):
        tuned = OpenAiFineTune("replies", examples=GOOD)
        for alias in ("", "a b", "it's"):
            with pytest.raises(BadOption, match="letters, digits"):
                OpenAiFineTune(alias, examples=GOOD)
        with pytest.raises(BadOption, match="select prompt, completion"):
            OpenAiFineTune("x", examples="select 1")  # type: ignore[arg-type]
        with pytest.raises(UnknownOption, match='Did you mean "system"'):
            OpenAiFineTune("x", examples=GOOD, sistem="")
        with pytest.raises(BadOption, match='declared above it. Did you mean "replies"'):
            OpenAiCompletion(Table("t"), model="alias:replys")
        with pytest.raises(BadOption, match='"ft:gpt-4.1-mini-2025-04-14:" is not'):
            OpenAiCompletion(Table("u"), model="alias:replies", budget="1 USD/day", max_tokens=5)
    assert "sk-" not in repr(tuned)
