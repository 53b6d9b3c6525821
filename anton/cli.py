"""The commands `anton` and its alias `autonomous`.

Exit code 0: fine; 1: something was found, or failed; 2: it was asked wrongly. --json prints what the text shows,
for programs. --database, --app and --json may stand before or after the verb.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NoReturn

from anton import action_verbs, component_verbs, people_verbs, verbs
from anton.app import while_loading
from anton.dbt import verbs as dbt
from anton.errors import (
    AntonError,
    ConfigError,
    DeclarationError,
    UnknownHandler,
    UnknownNode,
    UnknownTable,
    did_you_mean,
)
from anton.secret import hush_clients
from anton.share import version
from anton.verbs import FOUND, USAGE, emit

Args = argparse.Namespace


class Parser(argparse.ArgumentParser):
    """argparse that says what a mistyped word may have meant."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        unknown = re.search(r"unrecognized arguments: (--\S+)", message)
        if wrong:
            known = [word.strip(" '") for word in wrong[2].split(",")]
            message = f'"{wrong[1]}" is not known.{did_you_mean(wrong[1], known)} Known: {", ".join(known)}'
        elif unknown:
            known = [word for action in self._actions for word in action.option_strings]
            message += did_you_mean(unknown[1].partition("=")[0], known)
        self.exit(USAGE, f"{self.prog}: {message}\n")


STATES = ("new", "waiting", "ready", "sending", "retrying", "sent", "failed", "unknown", "captured", "refused",
          "rejected", "expired", "superseded")


def parser() -> argparse.ArgumentParser:
    """The whole command line; docs and tests read the verbs from it."""
    top = Parser("anton", description="Autonomous apps on plain Postgres: sense, think, act.", parents=[_globals(None)])
    top.add_argument("--version", action="version", version=f"anton {version()}")
    every = top.add_subparsers(metavar="VERB", required=True, parser_class=Parser)

    _verb(every, "new", verbs.new).add_argument("name", help="the folder to make; its name is the app's")
    one = _verb(every, "dev", verbs.dev)
    one.add_argument("--live", action="store_true", help="send effects instead of capturing them")
    one.add_argument("--port", type=_port, help="default: autonomous.json's, 3000")
    one = _verb(every, "migrate", verbs.do_migrate)
    one.add_argument("--plan", action="store_true", help="print the SQL, change nothing")
    one.add_argument("--check", action="store_true", help="exit 1 when there is something to do, change nothing")
    _verb(every, "makemigration", verbs.makemigration).add_argument("name", help="verb_noun, such as drop_legacy_total")
    one = _verb(every, "work", verbs.work)
    one.add_argument("--processes", type=_positive, help="default: autonomous.json's, 1")
    one.add_argument("--slots", type=_positive, help="calls at a time in each process")
    one.add_argument("--lease", help="how long a claim lasts without a heartbeat, such as 30s")
    one = _verb(every, "serve", verbs.serve)
    one.add_argument("--host", help="default: autonomous.json's, 127.0.0.1")
    one.add_argument("--port", type=_port, help="default: autonomous.json's, 3000; 0 is any free one")
    many = one.add_mutually_exclusive_group()
    many.add_argument("--workers", type=_positive, help="processes that serve; default: autonomous.json's, 1")
    many.add_argument("--reload", action="store_true", help="serve anew when a file of the app changes")
    one = _verb(every, "psql", verbs.psql)
    one.add_argument("-c", dest="command", action="append", metavar="SQL", help="run this and end; may be repeated")
    _verb(every, "status", verbs.do_status)
    one = _verb(every, "doctor", verbs.doctor)
    one.add_argument("--fix", action="store_true", help="mend what can be mended")
    one.add_argument("--reconcile", action="store_true", help="find changes that fired no trigger")
    one.set_defaults(findings=dbt.findings)
    _verb(every, "why", verbs.why).add_argument("record", metavar="TABLE/KEY")

    one = _verb(every, "graph", verbs.graph)
    one.add_argument("--downstream", metavar="NAME", help="only this and what comes of it")
    one.add_argument("--upstream", metavar="NAME", help="only this and what leads to it")
    one.add_argument("--columns", metavar="TABLE", help="where each column of a table comes from, and goes")
    one.add_argument("--mermaid", action="store_true", help="as a Mermaid flowchart")
    one.add_argument("--offline", action="store_true", help="from the code alone: without the database")

    noun = _noun(every, "handlers", "what listens to Tables")
    _verb(noun, "list", verbs.handlers_list)
    for verb, fn in (("show", verbs.handlers_show), ("pause", verbs.handlers_pause),
                     ("resume", verbs.handlers_resume), ("backfill", verbs.handlers_backfill)):
        _verb(noun, verb, fn).add_argument("name")
    noun = _noun(every, "schedules", "what runs by the clock")
    _verb(noun, "list", verbs.schedules_list)
    for verb, fn in (("show", verbs.schedules_show), ("pause", verbs.schedules_pause),
                     ("resume", verbs.schedules_resume), ("run", verbs.schedules_run)):
        _verb(noun, verb, fn).add_argument("name")
    one = _verb(noun, "next", verbs.schedules_next)
    one.add_argument("name")
    one.add_argument("count", type=_positive, nargs="?", default=5)
    noun = _noun(every, "models", "Tables that are kept by a SELECT")
    _verb(noun, "list", verbs.models_list)
    _verb(noun, "show", verbs.models_show).add_argument("name")
    one = _verb(noun, "run", verbs.models_run)
    one.add_argument("name")
    one.add_argument("--full", action="store_true", help="all rows, whatever has changed")
    noun = _noun(every, "components", "what Tables can be wired to: models and services")
    _verb(noun, "list", component_verbs.components_list)
    one = _verb(noun, "show", component_verbs.components_show)
    one.add_argument("name")
    one.add_argument("--markdown", action="store_true", help="as a page of documentation")
    noun = _noun(every, "jobs", "what waits and what is being worked")
    _some(_verb(noun, "list", verbs.jobs_list), "--handler")
    _verb(noun, "show", verbs.jobs_show).add_argument("id", type=int)
    _verb(noun, "cancel", verbs.jobs_cancel).add_argument("ids", type=int, nargs="+", metavar="id")
    noun = _noun(every, "dead", "records that were given up")
    _some(_verb(noun, "list", verbs.dead_list), "--handler")
    _verb(noun, "show", verbs.dead_show).add_argument("id", type=int)
    for verb, fn in (("replay", verbs.dead_replay), ("drop", verbs.dead_drop)):
        one = _verb(noun, verb, fn)
        one.add_argument("which", nargs="+", metavar="ID|HANDLER")
        one.add_argument("--error", default="", metavar="TEXT", help="of a handler: only those whose error holds this")
    noun = _noun(every, "actions", "calls of actions: what leaves the building")
    one = _verb(noun, "list", action_verbs.actions_list)
    _some(one, "--name")
    one.add_argument("--state", choices=STATES, help="only of this state")
    _verb(noun, "show", action_verbs.actions_show).add_argument("id", type=int)
    one = _verb(noun, "retry", action_verbs.actions_retry)
    one.add_argument("ids", type=int, nargs="+", metavar="id")
    one.add_argument("--by", metavar="PERSON", help="who says so")
    one = _verb(noun, "resolve", action_verbs.actions_resolve)
    one.add_argument("ids", type=int, nargs="+", metavar="id")
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument("--sent", action="store_true", help="they happened")
    what.add_argument("--failed", action="store_true", help="they did not")
    one.add_argument("--by", metavar="PERSON", help="who says so")
    _verb(noun, "stop", action_verbs.actions_stop)
    _verb(noun, "start", action_verbs.actions_start)
    noun = _noun(every, "approvals", "what people are asked before a call is sent")
    one = _verb(noun, "list", action_verbs.approvals_list)
    one.add_argument("--state", choices=("pending", "approved", "rejected", "expired", "superseded", "all"),
                     default="pending", help="default pending")
    one.add_argument("--limit", type=_positive, default=50)
    _verb(noun, "show", action_verbs.approvals_show).add_argument("id", type=int)
    one = _verb(noun, "approve", action_verbs.approvals_approve)
    one.add_argument("id", type=int)
    one.add_argument("--by", metavar="PERSON", required=True, help="who decides")
    one.add_argument("--set", metavar="NAME=VALUE", action="append", help="an argument as it is to be")
    one = _verb(noun, "reject", action_verbs.approvals_reject)
    one.add_argument("id", type=int)
    one.add_argument("--by", metavar="PERSON", required=True, help="who decides")
    one.add_argument("--why", help="told to whoever asked")
    noun = _noun(every, "people", "who decides")
    one = _verb(noun, "add", people_verbs.people_add)
    one.add_argument("name")
    one.add_argument("--email", metavar="ADDRESS")
    one.add_argument("--slack", metavar="ID", help="their member id, such as U012ABC")
    one.add_argument("--group", metavar="GROUP", action="append", help="such as finance; repeat it for more")
    _verb(noun, "list", people_verbs.people_list)
    _verb(noun, "remove", people_verbs.people_remove).add_argument("name")
    one = _verb(noun, "link", people_verbs.people_link)
    one.add_argument("name")
    one.add_argument("--url", help="where the app is served; default: deployment.url, else localhost")
    noun = _noun(every, "costs", "what models were asked, and what it cost")
    _verb(noun, "list", verbs.costs_list).add_argument("--days", type=_positive, default=30)
    one = _verb(noun, "calls", verbs.costs_calls)
    one.add_argument("--state", choices=("asking", "done", "failed", "unknown"), help="only of this state")
    one.add_argument("--limit", type=_positive, default=50)
    _verb(noun, "show", verbs.costs_show).add_argument("id", type=int)
    _verb(noun, "budgets", verbs.costs_budgets)
    one = _verb(noun, "settle", verbs.costs_settle)
    one.add_argument("ids", type=int, nargs="+", metavar="id")
    one.add_argument("--cost", type=_dollars, help="US dollars each; default what it can have cost "
                     "at most; 0: it never arrived there")
    _dbt(_noun(every, "dbt", "a dbt project of the app"))
    return top


def _dbt(noun: Any) -> None:
    """dbt's own commands take its own arguments, whatever they are."""
    _verb(noun, "init", dbt.dbt_init).add_argument("folder", nargs="?", default="dbt_project")
    for name in dbt.PASSED:
        one = _verb(noun, name, dbt.passes(name))
        one.allow_abbrev = False
        one.set_defaults(passed=[])
        one.add_argument("--project", metavar="NAME", help="of several; or the path of one")
    one = _verb(noun, "lineage", dbt.dbt_lineage)
    one.add_argument("model", nargs="?", default="")
    one.add_argument("--project", metavar="NAME", help="of several; or the path of one")
    one = _verb(noun, "changes", dbt.dbt_changes)
    one.add_argument("model")
    one.add_argument("--limit", type=_positive, default=20)
    one = _verb(noun, "log", dbt.dbt_log)
    one.add_argument("model")
    one.add_argument("--limit", type=_positive, default=1)
    one = _verb(noun, "cancel", dbt.dbt_cancel)
    one.add_argument("ids", type=int, nargs="*", metavar="run")
    one.add_argument("--waiting", action="store_true", help="also what is asked for and does not run yet")
    _verb(noun, "runs", dbt.dbt_runs).add_argument("--limit", type=_positive, default=20)


def _globals(default: Any) -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--database", metavar="URL", default=default, help='postgresql://…, "embedded" or env:NAME')
    shared.add_argument("--app", metavar="MODULE", default=default, help="default: autonomous.json's, main")
    shared.add_argument("--json", action="store_true", default=default or False, help="print JSON")
    return shared


def _verb(nouns: Any, name: str, fn: Callable[[Args], int]) -> argparse.ArgumentParser:
    about = (fn.__doc__ or "").strip()
    made: argparse.ArgumentParser = nouns.add_parser(name, help=about, description=about,
                                                     parents=[_globals(argparse.SUPPRESS)])
    made.set_defaults(verb=fn)
    return made


def _noun(nouns: Any, name: str, about: str) -> Any:
    made = nouns.add_parser(name, help=about, description=about)
    return made.add_subparsers(metavar="VERB", required=True, parser_class=Parser)


def _some(verb: argparse.ArgumentParser, filter: str) -> None:
    verb.add_argument(filter, help=f"only of this {filter.strip('-')}")
    verb.add_argument("--limit", type=_positive, default=50)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not possible; allowed: 1 or more")
    return int(text)


def _dollars(text: str) -> Decimal:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is not possible; allowed: US dollars, such as 0.0125")
    return Decimal(text)


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not possible; allowed: 0 to 65535")
    return int(text)


def parse(argv: Sequence[str] | None = None) -> Args:
    """The arguments; `passed` are those that are dbt's."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if rest and not hasattr(args, "passed"):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    args.passed = rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    args = parse(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s  %(message)s", level=logging.INFO)
    hush_clients()
    try:
        return int(args.verb(args))
    except AntonError as error:
        if args.json:
            emit(args, {"error": str(error), "kind": type(error).__name__}, "")
        print(f"anton: {error}", file=sys.stderr)
        return USAGE if _asked_wrongly(error) else FOUND
    except KeyboardInterrupt:
        return FOUND
    except BrokenPipeError:
        sys.stderr.close()
        return FOUND
    except Exception as error:
        told = while_loading(error)
        if told is None:
            raise
        if args.json:
            emit(args, {"error": told, "kind": type(error).__name__}, "")
        print(f"anton: {told}", file=sys.stderr)
        return USAGE


def _asked_wrongly(error: AntonError) -> bool:
    return isinstance(error, ConfigError | DeclarationError | UnknownHandler | UnknownNode | UnknownTable)
