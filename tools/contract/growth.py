"""What may change between two schemas: additions that an older node can overlook. Everything else is a break.

A break is allowed where proto/CHANGES.md names it, under the protocol version that it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Json = Mapping[str, Any]


def breaks(old: Json, new: Json) -> list[tuple[str, str]]:
    """(path, what happened) of each change that an older node could not overlook; empty: grown, or the same."""
    name = old["protocol"]
    found: list[tuple[str, str]] = []
    for part in ("constants", "tables", "layouts"):
        found += _changed(f"{name}/", old[part], new[part], 2 if part == "tables" else 1)
    for part in ("messages", "records"):
        for each, entry in old[part].items():
            # A message may become a record or the other way round: on the wire nothing changes.
            now = new[part].get(each) or new["messages"].get(each) or new["records"].get(each)
            found += [(f"{name}/{each}", "removed")] if now is None else _record(f"{name}/{each}", entry, now)
    return found


def _changed(path: str, old: Any, new: Any, depth: int) -> Iterator[tuple[str, str]]:
    """Entries of a mapping that are not what they were."""
    for key, value in old.items():
        if key not in new:
            yield path + key, "removed"
        elif depth > 1:
            yield from _changed(f"{path}{key}.", value, new[key], depth - 1)
        elif new[key] != value:
            yield path + key, f"was {value}, is {new[key]}"


def _record(path: str, old: Json, new: Json) -> Iterator[tuple[str, str]]:
    for key in ("form", "told_by", "tag"):
        if old.get(key) != new.get(key):
            yield path, f"{key} was {old.get(key)}, is {new.get(key)}"
    before, after = old["fields"], new["fields"]
    yield from _changed(f"{path}.", before, after, 1)
    if old["form"] == "list" and [*after][: len(before)] != [*before] and {*before} <= {*after}:
        yield path, "fields of a list changed places"
    for name in after.keys() - before.keys():
        if old.get("canonical"):
            yield f"{path}.{name}", "new in a record that is compared byte by byte"
        elif after[name]["required"]:
            yield f"{path}.{name}", "new, and an older node does not send it"


_SECTION = re.compile(r"^## Protocol (\d+)\b.*?$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^- `([^`]+)`: \S", re.MULTILINE)


def allowed(changes: str, protocol: int) -> frozenset[str]:
    """The paths that CHANGES.md gives a reason for under `## Protocol <protocol>`."""
    return frozenset(
        path for number, text in _SECTION.findall(changes) if int(number) == protocol for path in _ENTRY.findall(text)
    )
