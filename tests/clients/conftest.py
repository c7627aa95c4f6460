"""One mesh of three nodes for all clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import three_nodes
from tests.e2e.nodes import RealMesh


@pytest.fixture(scope="package")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealMesh]:
    made = three_nodes(tmp_path_factory.mktemp("clients"))
    yield made
    made.close()
