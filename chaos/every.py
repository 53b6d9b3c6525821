"""Every module of faults: imported, they register themselves in faults.FAULTS."""

from chaos import (  # noqa: F401
    builds,
    capacity,
    database,
    direct,
    edges,
    handlers,
    hooks,
    kills,
    limits,
    sensing,
    wire,
)
