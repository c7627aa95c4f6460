"""`python -m tests.io.stage.noisy_child FD WORDS`: says WORDS on both outputs, ends when its pair is closed."""

import ctypes
import os
import socket
import sys

connection = socket.socket(fileno=int(sys.argv[1]))
os.write(2, b"x" * 10_000 + b"\n")
ctypes.CDLL(None).printf(b"from native code: %s\n", sys.argv[2].encode())
ctypes.CDLL(None).fflush(None)
os.write(2, b"a last line without an end")
connection.sendall(b"ready")
connection.recv(1)
sys.exit(7)
