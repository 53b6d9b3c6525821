"""Handlers with a rate for each customer, of whom there are very many; they do nothing."""

from typing import Any

from anton import Table


@Table("met").on_new_records(each=True, rate="1000/h", per="k")
async def meet(record: Any) -> None:
    pass


@Table("hot").on_new_records(each=True, rate="100/m", per="k")
async def heat(record: Any) -> None:
    pass
