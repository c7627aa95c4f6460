"""A stage process: arguments are FD, its end of the node's socket pair, and LOCK, the file whose lock it inherited
(app/former). It is started by app/stage_start.

Puts the native engine, the sampler and TLS into io/stage. llama.cpp is loaded with the first model, so that a ping is
answered at once.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from meshnode.io.stage.child import main as run
from meshnode.io.stage.wiring import Engine, Sampler, Wiring
from meshnode.io.transport.tls import check_stage_peer, stage_context
from meshnode.wire.activation import Open
from meshnode.wire.stage_protocol import LoadStage

if TYPE_CHECKING:
    from meshnode.io.llama.engine import SliceEngine
    from meshnode.io.llama.grammar import AwaitedConstraint, GrammarThread


class Native:
    """The slice on llama.cpp, and what is made of its vocabulary."""

    def __init__(self) -> None:
        self._engine: SliceEngine | None = None
        self._grammars: GrammarThread | None = None

    def load_engine(self, what: LoadStage, progress: Callable[[float], bool]) -> Engine:
        """The slice of `what`. Raises ModelError, StageError."""
        from meshnode.io.llama.engine import EngineOptions, SliceEngine

        options = EngineOptions(
            context=what.options.context,
            lanes=what.options.lanes,
            chunk=what.options.chunk,
            kv_type=what.options.kv_type,
            flash_attention=what.options.flash_attention,
            threads=what.threads,
            kv_unified=what.options.kv_unified,
        )
        self._engine = self._grammars = None
        self._engine = SliceEngine.load(
            Path(what.slice_path),
            Path(what.embedding_path) if what.embedding_path else None,
            options,
            first=what.stage == 0,
            last=what.stage == what.stages - 1,
            progress=progress,
        )
        # The engine names its own type of microbatch, which has the same fields as the frame's.
        return cast(Engine, self._engine)

    def make_sampler(self, opened: Open, vocabulary: int) -> Sampler:
        """The sampler chain of a lane. Raises StageError."""
        from meshnode.io.llama.sampler import LaneSampler

        constraint = self._constrain(opened) if opened.sampling.grammar else None
        return LaneSampler(opened.sampling, vocabulary, opened.window, opened.generated, constraint)

    def _constrain(self, opened: Open) -> AwaitedConstraint:
        """The first grammar of a run makes what is needed for it: most runs never see one."""
        from meshnode.io.llama.grammar import GrammarThread

        assert self._engine is not None, "a lane opens on a loaded slice"
        if self._grammars is None:
            self._grammars = GrammarThread(self._engine.tokens)
        return self._grammars.constrain(opened.sampling.grammar, opened.accepted)


def main() -> None:
    """Run until the node says shutdown or is gone."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    # Values that are not finite are looked for and refused; numpy's warnings about them would only fill the log.
    np.seterr(all="ignore")
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    build = f"llama-cpp-python {version('llama-cpp-python')}"
    native = Native()
    run(connection, Wiring(build, native.load_engine, native.make_sampler, stage_context, check_stage_peer))
