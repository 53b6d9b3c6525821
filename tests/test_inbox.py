"""Inbox: people see what waits for them and decide it by POST; nothing else decides, and no GET changes anything."""

from __future__ import annotations

import re
from decimal import Decimal
from html import unescape

import pytest
from desk import Person, asked, form_of, know, link, sql

from anton import Approval, people
from benchmarks.approval import approval
from benchmarks.harness import Run
from benchmarks.server import Server


def test_a_person_sees_what_waits_and_approves_it(desk):
    id = asked(desk)
    assert "Refund 5 for order 7" in desk.ann.get("/inbox").text
    assert "Refund 5" not in desk.eve.get("/inbox").text
    page = desk.ann.get(f"/inbox/{id}").text
    assert "complaints" in page and "What it rests on" in page
    answer = desk.ann.decide(id, "approve")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/inbox/{id}?done")
    desk.run()
    assert desk.sent == [(7, Decimal(5), "card")]
    page = desk.ann.get(f"/inbox/{id}?done").text
    assert "Noted" in page and "by ann" in page and "via inbox" in page and 'value="approve"' not in page
    assert "Nothing waits for you" in desk.ann.get("/inbox").text
    assert "Refund 5 for order 7" in desk.ann.get("/inbox/history").text


def test_a_rejection_keeps_its_reason(desk):
    id = asked(desk)
    desk.ann.decide(id, "reject", why="no receipt")
    desk.run()
    assert desk.sent == [] and [(call.state, call.error) for call in desk.calls] == [("rejected", "no receipt")]
    assert "no receipt" in desk.ann.get("/inbox/history").text


def test_an_edit_is_checked_by_the_model_and_is_what_is_sent(desk):
    id = asked(desk)
    refused = desk.ann.decide(id, "approve", **{"arg.amount": "much"})
    assert refused.status_code == 422 and "aria-invalid" in refused.text and 'value="much"' in refused.text
    assert desk.ann.decide(id, "approve", **{"arg.how": "cash"}).status_code == 422
    assert desk.sent == [] and len(desk.approvals) == 1
    desk.ann.decide(id, "approve", **{"arg.amount": "3.50", "arg.how": "voucher"})
    desk.run()
    assert desk.sent == [(7, Decimal("3.50"), "voucher")]
    page = desk.ann.get(f"/inbox/{id}").text
    assert "Edited by a person" in page and "<del>5</del>" in page and "<ins>3.50</ins>" in page


def test_what_may_not_be_edited_is_no_field_and_is_left_alone_when_it_is_sent(desk):
    id = asked(desk)
    assert 'name="arg.order_id"' not in desk.ann.get(f"/inbox/{id}").text
    desk.ann.decide(id, "approve", **{"arg.order_id": "8"})
    desk.run()
    assert desk.sent == [(7, Decimal(5), "card")]


def test_values_are_escaped(desk):
    id = asked(desk, note='<script>alert(1)</script>"')
    page = desk.ann.get(f"/inbox/{id}").text
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_an_approval_is_seen_by_who_may_decide_who_asked_and_who_sees_all(desk):
    desk.refund.send(7, 5, by="gus")
    desk.run()
    id = desk.approvals[0].id
    gus, all_ = know(desk, "gus", "sales").sign_in(), know(desk, "root", "*").sign_in()
    page = gus.get(f"/inbox/{id}")
    assert "nobody approves their own" in page.text and 'value="approve"' not in page.text
    csrf = re.search(r'name="csrf" value="(\w+)"', desk.eve.get("/inbox").text)[1]
    form = {**form_of(desk.ann.get(f"/inbox/{id}").text), "csrf": csrf, "decision": "approve"}
    for answer in (desk.eve.get(f"/inbox/{id}"), desk.eve.post(f"/inbox/{id}", form),
                   desk.eve.post(f"/inbox/{id}/again", form)):
        assert answer.status_code == 404 and "Refund" not in answer.text and "There is no such approval" in answer.text
    assert len(desk.approvals) == 1
    for person in (desk.ann, all_):
        assert 'value="approve"' in person.get(f"/inbox/{id}").text
    desk.ann.decide(id, "reject", why="no receipt")
    assert [("Refund" in one.get("/inbox/history").text, one.get(f"/inbox/{id}").status_code, "order_id" in
             one.get("/inbox/flow").text) for one in (desk.eve, desk.ann, gus, all_)] == [
        (False, 404, False), (True, 200, False), (True, 200, False), (True, 200, True)]


def test_who_is_named_for_one_call_alone_decides_it_besides_those_of_its_action(desk):
    desk.refund.send(7, 5, approve=Approval("@legal"))
    desk.run()
    id, lea = desk.approvals[0].id, know(desk, "lea", "legal").sign_in()
    assert "needed: 1 of @finance and 1 of @legal" in lea.get(f"/inbox/{id}").text
    lea.decide(id, "approve")
    assert "others have to, too" in lea.get(f"/inbox/{id}").text
    desk.ann.decide(id, "approve")
    desk.run()
    assert desk.sent == [(7, Decimal(5), "card")]


def test_a_link_of_who_may_not_decide_any_more_shows_nothing(desk):
    id = asked(desk)
    path = link(desk, "ann", id)
    know(desk, "ann", "sales")
    assert Person(desk, "ann").get(path).status_code == 404
    answer = Person(desk, "ann").post(path, {"decision": "approve"})
    assert answer.status_code == 404 and "Refund" not in answer.text and len(desk.approvals) == 1


def test_nobody_approves_what_they_asked_for(desk):
    desk.refund.send(7, 5, by="ann")
    desk.run()
    id = desk.approvals[0].id
    assert "Nothing waits" in desk.ann.get("/inbox").text
    assert "nobody approves their own" in desk.ann.get(f"/inbox/{id}").text


@pytest.mark.parametrize("wrong", [{"csrf": ""}, {"csrf": "0" * 64}])
def test_without_the_pages_own_token_nothing_is_decided(desk, wrong):
    id = asked(desk)
    assert desk.ann.decide(id, "approve", **wrong).status_code == 403
    assert len(desk.approvals) == 1


@pytest.mark.parametrize("header", [{"origin": "https://evil.example"}, {"origin": "null"},
                                    {"sec-fetch-site": "cross-site"}])
def test_a_form_of_another_site_decides_nothing(desk, header):
    id = asked(desk)
    filled = {**form_of(desk.ann.get(f"/inbox/{id}").text), "decision": "approve"}
    assert desk.ann.post(f"/inbox/{id}", filled, **header).status_code == 403
    assert len(desk.approvals) == 1


def test_arguments_other_than_those_that_were_shown_are_not_decided(desk):
    id = asked(desk)
    answer = desk.ann.decide(id, "approve", sha256="0" * 64)
    assert answer.status_code == 422 and "not those that were shown" in unescape(answer.text)
    assert len(desk.approvals) == 1


def test_who_comes_later_hears_who_decided(desk):
    id = asked(desk)
    bob = know(desk, "bob", "finance").sign_in()
    filled = {**form_of(bob.get(f"/inbox/{id}").text), "decision": "reject"}
    desk.ann.decide(id, "approve")
    assert bob.post(f"/inbox/{id}", filled).headers["location"] == f"/inbox/{id}?late"
    page = bob.get(f"/inbox/{id}?late").text
    assert "decided before you" in page and "by ann" in page


def test_a_changed_record_asks_again_with_the_difference(desk):
    id = asked(desk)
    filled = {**form_of(desk.ann.get(f"/inbox/{id}").text), "decision": "approve"}
    sql(desk, "update complaints set data = data || '{\"total\": 9}'")
    page = desk.ann.get(f"/inbox/{id}").text
    assert "Changed since it was asked" in page and 'value="approve"' not in page
    answer = desk.ann.post(f"/inbox/{id}", filled)                     # whoever had the page open before
    next = int(re.fullmatch(r"/inbox/(\d+)\?changed", answer.headers["location"])[1])
    page = desk.ann.get(f"/inbox/{next}?changed").text
    assert "Asked again, as this has changed" in page and next != id
    desk.run()
    assert desk.sent == []
    desk.ann.decide(next, "approve")
    desk.run()
    assert len(desk.sent) == 1


def test_what_could_not_be_done_of_an_approval_is_said_on_its_page(desk):
    id = asked(desk)
    sql(desk, f"alter table anton.approval_event add constraint broken check (approval_id <> {id}) not valid")
    desk.advance("25h")
    desk.ann.sign_in()
    page = unescape(desk.ann.get(f"/inbox/{id}").text)
    assert "could not be done, and is tried again each minute" in page and 'violates check constraint "broken"' in page
    sql(desk, "alter table anton.approval_event drop constraint broken")
    desk.advance("2m")
    assert "could not be done" not in desk.ann.get(f"/inbox/{id}").text


def test_what_has_changed_can_be_asked_again_from_its_page(desk):
    id = asked(desk)
    csrf = form_of(desk.ann.get(f"/inbox/{id}").text)["csrf"]
    sql(desk, "update complaints set data = data || '{\"total\": 9}'")
    answer = desk.ann.post(f"/inbox/{id}/again", {"csrf": csrf})
    assert answer.headers["location"].endswith("?changed") and desk.approvals[0].id != id


# Signing in


def test_nobody_sees_anything_without_signing_in(desk):
    id = asked(desk)
    stranger = Person(desk, "x")
    for path in ("/inbox", "/inbox/history", f"/inbox/{id}", "/inbox/flow"):
        answer = stranger.get(path)
        assert answer.status_code == 401 and "Refund" not in answer.text and "anton people link" in answer.text
    assert stranger.post(f"/inbox/{id}", {"decision": "approve"}).status_code == 403
    assert len(desk.approvals) == 1


def test_a_link_signs_in_once_and_a_get_does_not_use_it_up(desk):
    path = link(desk, "ann")
    for _ in range(3):
        assert Person(desk, "ann").get(path).status_code == 200
    assert Person(desk, "ann").post(path, {}).status_code == 303
    assert Person(desk, "ann").post(path, {}).status_code == 410
    assert "It was used" in Person(desk, "ann").get(path).text


def test_a_link_ends_and_so_does_a_session(desk):
    path = link(desk, "ann")
    desk.advance("16m")
    assert Person(desk, "ann").post(path, {}).status_code == 410
    assert desk.ann.get("/inbox").status_code == 200
    desk.advance("12h")
    assert desk.ann.get("/inbox").status_code == 401


def test_the_database_holds_no_token(desk):
    token = link(desk, "ann").rpartition("/")[2]
    assert len(token) == 43
    session = desk.ann.cookie.partition("=")[2]
    held = str(sql(desk, "select l::text from anton.link l union all select s::text from anton.session s"))
    assert token not in held and session not in held and people.digest(token) in held


def test_the_cookie_is_the_servers_alone(desk):
    said = desk.ann.set_cookie.lower()
    assert "httponly" in said and "samesite=lax" in said and "path=/inbox" in said and "secure" not in said


def test_over_https_the_cookie_is_secure(desk):
    answer = desk.app_over_https = Person(desk, "ann").post(link(desk, "ann").replace("/", "https://test/", 1), {})
    assert "secure" in answer.headers["set-cookie"].lower()


def test_signing_out_ends_the_session(desk):
    csrf = re.search(r'name="csrf" value="(\w+)"', desk.ann.get("/inbox").text)[1]
    cookie = desk.ann.cookie
    assert desk.ann.post("/inbox/out", {"csrf": csrf}).status_code == 303
    desk.ann.cookie = cookie
    assert desk.ann.get("/inbox").status_code == 401


def test_who_is_removed_is_signed_out(desk):
    sql(desk, "select anton.drop_person('ann')")
    assert desk.ann.get("/inbox").status_code == 401


def test_no_page_asks_anything_of_another_server(desk):
    id = asked(desk)
    for path in ("/inbox", f"/inbox/{id}", "/inbox/history", "/inbox/style.css", "/inbox/live.js"):
        answer = desk.ann.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert not re.search(r'(?:src|href|action)="(?:https?:)?//', answer.text)
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", answer.text)


def test_every_answer_is_kept_by_nobody_framed_by_nobody_and_tells_no_other_site_where_it_came_from(desk):
    id = asked(desk)
    paths = ["/inbox", "/inbox/history", "/inbox/flow", f"/inbox/{id}", "/inbox/0", "/inbox/out"]
    links = [link(desk, "ann"), link(desk, "ann", id), "/inbox/in/none", "/inbox/link/none"]
    answers = [*map(desk.ann.get, paths), Person(desk, "").get("/inbox"), desk.ann.post(f"/inbox/{id}", {})]
    silent = [*map(desk.ann.get, links), *(desk.ann.post(path, {}) for path in links)]
    for answer in answers + silent:
        if answer.status_code == 405:
            continue
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"], answer.url
        assert answer.headers["cache-control"] == "no-store" and answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == ("no-referrer" if answer in silent else "same-origin"), answer.url


@pytest.mark.parametrize("approval", [True, False], ids=["decides", "signs in"])
def test_a_form_of_another_site_uses_no_link_up(desk, approval):
    path, mail = link(desk, "ann", asked(desk) if approval else None), Person(desk, "ann")
    page, null = mail.get(path), {"origin": "null"}
    filled = {**form_of(page.text), "decision": "reject"}
    for headers in (null, {**null, "sec-fetch-site": "cross-site"}, {"origin": "https://evil.example"}):
        assert mail.post(path, filled, **headers).status_code == 410
    mail.cookie = page.headers["set-cookie"].partition(";")[0]         # as it is the page's own form
    assert mail.post(path, filled, **null).status_code == (200 if approval else 303)


# By link


def test_a_link_shows_one_approval_and_decides_it_once(desk):
    id, mail = asked(desk), Person(desk, "ann")
    path = link(desk, "ann", id)
    page = mail.get(path)
    assert page.status_code == 200 and "Refund 5 for order 7" in page.text
    filled = {**form_of(page.text), "arg.amount": "4", "decision": "approve"}
    answer = mail.post(path, filled)
    assert answer.status_code == 200 and "Noted" in answer.text
    desk.run()
    assert desk.sent == [(7, Decimal(4), "card")]
    assert mail.post(path, filled).status_code == 422 or mail.get(path).status_code == 410
    (row,) = sql(desk, "select decided_by, decided_via from anton.approval where id = $1", id)
    assert tuple(row) == ("ann", "email")


def test_a_link_is_good_for_no_other_page(desk):
    id = asked(desk)
    path = link(desk, "ann", id)
    token = path.rpartition("/")[2]
    assert Person(desk, "ann").post(f"/inbox/in/{token}", {}).status_code == 410
    sign_in = link(desk, "ann").rpartition("/")[2]
    assert Person(desk, "ann").post(f"/inbox/link/{sign_in}", {"decision": "approve"}).status_code == 410
    assert len(desk.approvals) == 1


def test_a_link_for_other_arguments_decides_nothing(desk):
    id = asked(desk)
    know(desk, "bob", "finance")
    path = link(desk, "ann", id)
    sql(desk, "alter table anton.approval disable trigger all")
    sql(desk, "update anton.approval set args = args || '{\"amount\": \"900\"}', "
              "args_sha256 = anton.args_hash(args || '{\"amount\": \"900\"}') where id = $1", id)
    sql(desk, "alter table anton.approval enable trigger all")
    assert "not those that this link was made for" in unescape(Person(desk, "ann").get(path).text)
    answer = Person(desk, "ann").post(path, {"decision": "approve"})
    assert answer.status_code == 422 and len(desk.approvals) == 1


def test_a_link_is_made_only_for_who_may_decide(desk):
    id = asked(desk)
    with pytest.raises(Exception, match="eve is not among those who may"):
        link(desk, "eve", id)
    with pytest.raises(Exception, match='nobody is called "zoe"'):
        link(desk, "zoe")


def test_a_link_ends_with_its_approval(desk):
    path = link(desk, "ann", asked(desk))
    desk.advance("25h")
    assert Person(desk, "ann").get(path).status_code == 410
    assert Person(desk, "ann").post(path, {"decision": "approve"}).status_code != 303 and desk.sent == []


def test_eight_channels_scanners_and_nine_wrong_ways_decide_nothing_that_they_must_not(server):
    row = approval(Run(Server(server.url()), quick=True))["approval_wrong"]
    assert (row.value, row.detail["wrong"]) == (0, {}) and row.detail["approved"] > 0
