"""The door to llama.cpp: version check, log, and the few ggml functions that llama_cpp does not name.

Structs change between releases and a mismatch is silent, so the exact version is checked on import.
Invariant: native code writes nothing to stdout; its log goes to the logger `meshnode.llama`.
"""

from __future__ import annotations

import ctypes
import logging
import re
import sys
from importlib.metadata import version
from threading import Lock
from typing import Any

from meshnode.errors import ConfigError

__all__ = [
    "REQUIRED_VERSION",
    "AbortFlag",
    "LogTap",
    "api",
    "graph_tensor",
    "listen",
    "set_output",
    "start",
    "tensor_bytes",
    "tensor_get",
    "tensor_name",
    "tensor_set",
    "type_traits",
]

REQUIRED_VERSION = "0.3.36"

if version("llama-cpp-python") != REQUIRED_VERSION:
    raise ConfigError(
        f"llama-cpp-python {version('llama-cpp-python')} is installed, this version needs {REQUIRED_VERSION} exactly",
        f"pip install llama-cpp-python=={REQUIRED_VERSION}",
    )

from llama_cpp import llama_cpp as api  # noqa: E402 (only behind the version check)
from llama_cpp._ctypes_extensions import load_shared_library  # noqa: E402

_log = logging.getLogger("meshnode.llama")
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
# "CPU KV buffer size = 12.00 MiB": what native code says about its memory; the only place where it says it.
_BUFFER_LINE = re.compile(r"(\S+) +(model|KV|RS|compute|output) buffer size += +([0-9.]+) MiB")

_ggml = load_shared_library("ggml-base", api._base_path)
_libc = ctypes.CDLL(None) if sys.platform != "win32" else ctypes.cdll.msvcrt


def _bind(name: str, arguments: list[Any], result: Any) -> Any:
    function = getattr(_ggml, name)
    function.argtypes, function.restype = arguments, result
    return function


tensor_name = _bind("ggml_get_name", [ctypes.c_void_p], ctypes.c_char_p)
tensor_bytes = _bind("ggml_nbytes", [ctypes.c_void_p], ctypes.c_size_t)
tensor_get = _bind(
    "ggml_backend_tensor_get", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None
)
tensor_set = _bind(
    "ggml_backend_tensor_set", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None
)
graph_tensor = _bind("ggml_graph_get_tensor", [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p)
set_output = _bind("ggml_set_output", [ctypes.c_void_p], None)


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h at the pinned version."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )


type_traits = _bind("ggml_get_type_traits", [ctypes.c_int], ctypes.POINTER(_TypeTraits))


class LogTap:
    """Collects the buffer sizes that native code reports while a model and its context are made, in bytes by kind."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self.errors: list[str] = []

    def feed(self, level: int, text: str) -> None:
        """Look at one log line."""
        match = _BUFFER_LINE.search(text)
        if match:
            kind = match[2].lower()
            self.bytes[kind] = self.bytes.get(kind, 0) + round(float(match[3]) * (1 << 20))
        if level == 4 and len(self.errors) < 8:
            self.errors.append(text.strip()[:300])


_tap: LogTap | None = None
_started = False
_start_lock = Lock()


def _on_log(level: int, text: bytes, _user: object) -> None:
    line = text.decode("utf-8", "replace")
    if _tap is not None:
        _tap.feed(level, line)
    _log.log(_LEVELS.get(level, logging.DEBUG), "%s", line.rstrip())


# Kept for the life of the process: native code holds its address.
_log_callback = api.llama_log_callback(_on_log)


def start() -> None:
    """Start the backends once, with the log turned away from stdout and stderr."""
    global _started  # noqa: PLW0603 (one native library a process)
    with _start_lock:
        if not _started:
            api.llama_log_set(_log_callback, ctypes.c_void_p(0))
            api.llama_backend_init()
            _started = True


def listen(tap: LogTap | None) -> None:
    """Send what native code says about memory and failures to `tap`; None stops it."""
    global _tap  # noqa: PLW0603 (the native log has one receiver a process)
    _tap = tap


class AbortFlag:
    """A flag that native code polls without entering Python: `strlen` of a one-character buffer is the abort callback.

    A Python callback would be entered once a graph node.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        address = ctypes.cast(_libc.strlen, ctypes.c_void_p).value
        self.callback = api.ggml_abort_callback(address)
        self.data = ctypes.cast(self._buffer, ctypes.c_void_p)

    def set(self) -> None:
        """Ask the running decode to stop; from any thread."""
        self._buffer[0] = b"x"

    def clear(self) -> None:
        """Let the next decode run."""
        self._buffer[0] = b"\0"
