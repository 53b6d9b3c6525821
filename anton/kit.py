"""Kit: what components are written with; all of Anton that they import, ours as well as yours.

    from anton.kit import Component, HandlerSpec, WorldError

What everybody uses (Table, env, sql, Ctx, Discard …) is in `anton`, meaning types are in `anton.meaning`. Other modules
are Anton's own and change without notice.
"""

from anton.action import effects
from anton.app import current_app
from anton.ask import Question, Reply, SendError, status_error
from anton.calls import Call
from anton.completion import Completion, CompletionOptions
from anton.component import Clients, Component, echo, fill, names_of, placeholders, tls
from anton.db import current_database, quote, to_json
from anton.embedding import Embedded, Embedding, EmbeddingOptions
from anton.errors import BadOption, ConfigError, DecisionRefused, WorldError, one_of
from anton.fate import say, status_of
from anton.handler import HandlerSpec
from anton.limit import Limit, learnt, retry_after
from anton.notices import Notice, Notices, base_of, compose
from anton.outbox import ActionComponent
from anton.price import Price, Prices
from anton.query import Sql
from anton.reach import addresses, is_public
from anton.secret import Env, hide_within, reveal, revealed, unset_of
from anton.threads import in_thread
from anton.tuning import FineTune, Job, Refused
from anton.verify import SCHEMES

__all__ = ["SCHEMES", "ActionComponent", "BadOption", "Call", "Clients", "Completion", "CompletionOptions",
           "Component", "ConfigError", "DecisionRefused", "Embedded", "Embedding", "EmbeddingOptions", "Env",
           "FineTune", "HandlerSpec", "Job", "Limit", "Notice", "Notices", "Price", "Prices", "Question", "Refused",
           "Reply", "SendError", "Sql", "WorldError", "addresses", "base_of", "compose", "current_app",
           "current_database", "echo", "effects", "fill", "hide_within", "in_thread", "is_public", "learnt", "names_of",
           "one_of", "placeholders", "quote", "retry_after", "reveal", "revealed", "say", "status_error",
           "status_of", "tls", "to_json", "unset_of"]
