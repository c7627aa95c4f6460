"""Model bytes between nodes and on disk: fetch, verify, cache, serve.

Invariant: no byte counts before the SHA-256 of its whole artifact equals the manifest's; a file has its final name only
when every artifact in it counts; what a peer says is never used as a path.
"""

from meshnode.io.artifacts.bulk import BulkClient, serve_bulk
from meshnode.io.artifacts.library import Library, ModelSource
from meshnode.io.artifacts.store import ArtifactStore, PreparedSlice

__all__ = ["ArtifactStore", "BulkClient", "Library", "ModelSource", "PreparedSlice", "serve_bulk"]
