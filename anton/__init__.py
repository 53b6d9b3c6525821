"""Anton: autonomous apps on plain Postgres. Sense, think, act.

    from anton import Records, Table, app, cron, post

Everything users type is here; the modules behind it say more: table.py, handler.py, write.py, query.py, sense.py.
"""

from anton.app import app
from anton.approval import Approval
from anton.ctx import Ctx
from anton.dbt.project import DbtProject
from anton.errors import Discard, Retry
from anton.files import Files
from anton.outbox import action
from anton.poll import poll
from anton.query import sql
from anton.rebuilt import Failed as Failed
from anton.rebuilt import Rebuilt as Rebuilt
from anton.record import Record as Record
from anton.record import Records
from anton.schedule import cron
from anton.secret import env
from anton.sense import Request, Webhook, delete, get, patch, post, put
from anton.signed import Hmac as Hmac
from anton.table import Table
from anton.vector import Vector as Vector
from anton.write import transaction

__all__ = ["Approval", "Ctx", "DbtProject", "Discard", "Files", "Records", "Request", "Retry", "Table", "Webhook",
           "action", "app", "cron", "delete", "env", "get", "patch", "poll", "post", "put", "sql", "transaction"]
