"""A stage process with an engine of a few lines that can hang: `python -m tests.io.stage.toy_stage FD`.

Token 1 computes until aborted, token 2 hangs for ever, token 3 ends the process, any other gives logits whose largest
is token + 1. What real native code does only by accident.
"""

import ctypes
import os
import socket
import sys
import threading

import numpy as np

from meshnode.app.stage_main import Native
from meshnode.errors import StageError
from meshnode.io.stage import computing
from meshnode.io.stage.child import main
from meshnode.io.stage.wiring import Wiring
from meshnode.io.transport.tls import check_stage_peer, stage_context

VOCABULARY = 16


class ToyEngine:
    width, vocabulary, trim_any = 1, VOCABULARY, True

    def __init__(self):
        self._held = {}
        self._aborted = threading.Event()

    def decode(self, rows):
        # Native code prints: nothing of it may reach the protocol.
        ctypes.CDLL(None).puts(b"a stray line of native code")
        for lane, position in zip(rows.lanes, rows.positions, strict=True):
            self._held[lane] = position + 1
        tokens = rows.tokens
        if 1 in tokens:
            self._aborted.wait()
            self._aborted.clear()
            raise StageError("aborted", "the decode was stopped")
        if 2 in tokens:
            threading.Event().wait()
        if 3 in tokens:
            os.abort()
        wanted = np.array(tokens)[np.array(rows.logits)]
        return np.eye(VOCABULARY, dtype=np.float32)[(wanted + 1) % VOCABULARY]

    def rehearse(self, rows):
        assert rows.tokens

    def trim(self, lane, position):
        self._held[lane] = min(self.next_position(lane), position)
        return True

    def clear(self, lane):
        self._held[lane] = 0

    def copy(self, source, target, length):
        self._held[target] = length

    def next_position(self, lane):
        return self._held.get(lane, 0)

    def abort(self):
        self._aborted.set()

    def fingerprint(self):
        return "toy"

    def memory_bytes(self):
        return {}

    def close(self):
        self._held.clear()


if __name__ == "__main__":
    computing.ABORT_GRACE_S = 0.1
    wiring = Wiring("toy", lambda what, progress: ToyEngine(), Native().make_sampler, stage_context, check_stage_peer)
    main(socket.socket(fileno=int(sys.argv[1])), wiring)
