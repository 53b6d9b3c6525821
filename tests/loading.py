"""python loading.py FOLDER DATABASE STORAGE PATH MODEL: loads a file in small pieces, to be killed while it does."""

from __future__ import annotations

import sys
from datetime import datetime
from decimal import Decimal
from typing import Literal

from pydantic import BaseModel, field_validator

from anton import config, load
from anton.app import App, declaring
from anton.db import Database, set_database
from anton.files import Files
from anton.table import Table


class Order(BaseModel):
    id: int
    customer: str
    total: Decimal | None = None
    status: Literal["new", "paid"] = "new"
    at: datetime | None = None


class Checked(Order):
    @field_validator("customer")
    @classmethod
    def not_bob(cls, value: str) -> str:
        if value == "Bob":
            raise ValueError("is Bob")
        return value


MODELS = {"copied": Order, "checked": Checked}                         # the two ways a CSV goes


def main(folder: str, url: str, storage: str, path: str, model: str) -> None:
    load.READ, load.RAW, load.PARSED, load.ROWS = 2_000, 4_000, 4_000, 200
    db = Database(url)
    set_database(db)
    app = App("store", folder)
    app.settings = config.load(folder).settings
    with declaring(app):
        files, orders = Files(storage), Table("orders", MODELS[model])
    done = db.run(files.find(path)).load(orders)
    print(done.rows, done.rejected)


if __name__ == "__main__":
    main(*sys.argv[1:])
