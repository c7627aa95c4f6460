"""One factory for footprints, inventories and demands (R103)."""

from meshnode.core.planning import Demand, Inventory, LayerFootprint, ModelFootprint, NodeInventory
from meshnode.core.planning.context import STAGE_RESERVE_BYTES

DIGEST = "d" * 64
RESERVE = STAGE_RESERVE_BYTES
MB = 1_000_000


def footprint(layers=8, *, weight=100 * MB, kv_values=1024, trained=8192, **more):
    """Equal layers (or `layers` as LayerFootprints); every cut allowed unless said otherwise."""
    if isinstance(layers, int):
        layers = [LayerFootprint(weight, kv_values)] * layers
    values = {
        "manifest_digest": DIGEST,
        "name": "model",
        "architecture": "llama",
        "width": 64,
        "vocabulary": 1000,
        "context_trained": trained,
        "layers": tuple(layers),
        "embedding_bytes": 30 * MB,
        "output_bytes": 40 * MB,
        "boundaries": tuple(range(1, len(layers))),
    }
    return ModelFootprint(**(values | more))


def demand(**more):
    values = {"deployment": "dep", "version": 1, "author": "a", "manifest_digest": DIGEST, "model": "model"}
    return Demand(**(values | more))


def inventory(*usable, names="abcdefghijklmnop"):
    """Nodes a, b, c... that offer these bytes beside the reserve of a stage."""
    nodes = zip(names, usable, strict=False)
    return Inventory(tuple(NodeInventory(name, name.upper(), RESERVE + size) for name, size in nodes))


def away(layers=8):
    """A node that takes no part and has every layer: with it, an author who is away is no shortfall."""
    cached = {DIGEST: tuple(f"layer.{index}" for index in range(layers))}
    return NodeInventory("~", "archive", 0, cached=cached, excluded="draining")


def archived(machines, layers=8):
    """The same machines, and somebody who has the layers."""
    return Inventory((*machines.nodes, away(layers)), machines.links)
