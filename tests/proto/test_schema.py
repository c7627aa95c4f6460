"""proto/ says what the types say, and says everything."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

import msgspec
import pytest

from meshnode import identity, wire
from meshnode.app import passing
from meshnode.core import membership
from meshnode.identity import invite_book, issuers
from meshnode.wire import activation, messages, stage_protocol
from tools.contract.protocols import Protocol, protocols
from tools.contract.schema import schema
from tools.export_schema import PROTO, exported, files, recorded, refused

LOCAL = {
    # Bases: no message by themselves.
    messages.Message,
    stage_protocol.StageMessage,
    activation.LaneOperation,
    # What a decoder hands out for an op that it does not know.
    messages.Unrecognised,
    stage_protocol.Unknown,
    # Frames in memory; on the wire they are the layouts of activation.json and vectors/frames.json.
    activation.Rows,
    activation.SampledFrame,
    activation.FailedFrame,
    activation.Heartbeat,
    activation.Header,
    # A file of the issuer.
    invite_book.InviteBook,
    invite_book.InviteEntry,
    invite_book.Admission,
    # A file of who holds the root key.
    issuers.Appointment,
}
"""Structs beside the messages that never travel as such."""


def modules(package: ModuleType) -> list[ModuleType]:
    names = [item.name for item in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    return [importlib.import_module(name) for name in names]


def structs() -> set[type]:
    """All of the folders that messages are defined in."""
    found: set[type] = set()
    for module in (*modules(identity), *modules(wire), *modules(membership), passing):
        for name, item in inspect.getmembers(module, inspect.isclass):
            if issubclass(item, msgspec.Struct) and item.__module__ == module.__name__ and not name.startswith("_"):
                found.add(item)
    return found


def reached(kinds: list[type]) -> set[type]:
    """`kinds` and every struct inside their fields."""
    found: set[type] = set()
    waiting: list[object] = [msgspec.inspect.type_info(kind) for kind in kinds]
    while waiting:
        item = waiting.pop()
        if isinstance(item, msgspec.inspect.StructType):
            if item.cls in found:
                continue
            found.add(item.cls)
        for name in getattr(item, "__struct_fields__", ()):
            value = getattr(item, name)
            waiting += value if isinstance(value, tuple) else [value]
    return found


@pytest.mark.parametrize("protocol", protocols(), ids=lambda protocol: protocol.name)
def test_the_recorded_contract_is_that_of_the_types(protocol: Protocol) -> None:
    assert refused(protocol) == [], "an older node could not overlook this: see proto/CHANGES.md"
    stale = [path.name for path, text in files(protocol).items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "it grew: run python -m tools.export_schema"
    assert recorded("schema", protocol) == exported(protocol)


def test_every_struct_that_travels_is_in_the_contract() -> None:
    traveling = reached([kind for protocol in protocols() for kind in protocol.messages])
    assert {kind.__name__ for kind in structs() - traveling - LOCAL} == set()
    assert not LOCAL & traveling


def test_no_file_of_the_contract_is_left_over() -> None:
    names = {f"{protocol.name}.json" for protocol in protocols()}
    assert {path.name for path in (PROTO / "schema").iterdir()} == names
    assert {path.name for path in (PROTO / "vectors").iterdir()} == {*names, "frames.json", "proofs.json"}


def test_every_word_of_a_schema_is_explained() -> None:
    """A type is a word of the README or the name of an entry of the same file."""
    known = {"int", "str", "bytes", "float", "bool", "null", "list", "tuple", "map"}
    for protocol in protocols():
        whole = schema(protocol)
        entries = whole["messages"] | whole["records"]
        assert len(entries) == len(whole["messages"]) + len(whole["records"])
        for entry in entries.values():
            for field in entry["fields"].values():
                word = field["type"].split("/")[0]
                names = word.replace("<", " ").replace(">", " ").replace(",", " ").replace("|", " ").split()
                assert {name.split("(")[0] for name in names} - {""} <= known | set(entries), field
