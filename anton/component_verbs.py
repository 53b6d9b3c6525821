"""The verbs of `anton components`."""

from __future__ import annotations

from anton.errors import ConfigError, did_you_mean
from anton.installed import installed, page
from anton.status import layout, layout_one
from anton.verbs import FOUND, OK, Args, emit


def components_list(args: Args) -> int:
    """List the components that are installed, and those that cannot be imported."""
    found = installed()
    rows = [one.facts() for one in found]
    emit(args, rows, layout([{**row, "about": row["about"][:80]} for row in rows], ("name", "module", "about")))
    return OK if all(one.cls for one in found) else FOUND


def components_show(args: Args) -> int:
    """Show a component and its options. --markdown prints its page of documentation."""
    found = {one.name: one for one in installed()}
    if args.name not in found:
        raise ConfigError(f'there is no component "{args.name}".{did_you_mean(args.name, found)} '
                          f"There are: {', '.join(found)}", name=args.name)
    one = found[args.name]
    facts = one.facts()
    if args.markdown and one.cls is not None:
        emit(args, facts, page(one).rstrip())
        return OK
    options = facts.pop("options", {})
    rows = [{"option": name, "type": option["type"],
             "default": repr(option["default"]) if "default" in option else "must be given", "about": option["about"]}
            for name, option in options.items()]
    emit(args, {**facts, "options": rows},
         layout_one(facts) + ("\n\n" + layout(rows, ("option", "type", "default", "about")) if rows else ""))
    return OK if one.cls is not None else FOUND
