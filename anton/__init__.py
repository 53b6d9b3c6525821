"""Anton: autonomous apps on plain Postgres. Sense, think, act."""

from anton.app import app
from anton.errors import Discard, Retry
from anton.record import Records
from anton.schedule import cron
from anton.secret import env
from anton.write import transaction

__all__ = ["Discard", "Records", "Retry", "app", "cron", "env", "transaction"]
