"""Gate: which tests of a project are run inside of which build, and which only after them.

A test can be counted inside of a build when all else that it reads is there by then: it gates the last of its models,
the one that all its others lead to. Of models that are built side by side none is the last, so their test is run once
they are built; by then they are served.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from anton.dbt.manifest import Manifest


def gates(manifest: Manifest, ids: Collection[str]) -> tuple[dict[str, str], set[str]]:
    """{test: the model that it gates} when these are built, and the tests that none of them can run, as what else they
    read is made of them and not built now. Tests of other models are in neither; those of side by side have none: "".
    """
    gate: dict[str, str] = {}
    stale: set[str] = set()
    for id in manifest.tests:
        read = manifest.reads_of_test(id)
        built = read & set(ids)
        if not built:
            continue
        if (read - built) & manifest.downstream(built):
            stale.add(id)
            continue
        last = [one for one in built if built - {one} <= manifest.upstream([one])]
        gate[id] = last[0] if last else ""
    return gate, stale


def after(manifest: Manifest, gate: Mapping[str, str], built: Collection[str], failed: Collection[str]) -> list[str]:
    """The tests to be run now that these are built: those that no build of them ran, of models that all went well."""
    return sorted(id for id, model in gate.items() if model not in built
                  and manifest.reads_of_test(id) & set(built) and not manifest.reads_of_test(id) & set(failed))


def compiled(gate: Mapping[str, str], found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What dbt_put_tests() takes, of what dbt compiled."""
    return [{"unique_id": gate[raw["node"]], "name": raw["name"], "sql": raw["code"],
             "severity": str((raw["test"] or {}).get("severity") or "error").lower(),
             **{key: raw["test"][key] for key in ("fail_calc", "error_if", "warn_if") if (raw["test"] or {}).get(key)}}
            for raw in found if gate.get(raw["node"]) and raw["code"] is not None]
