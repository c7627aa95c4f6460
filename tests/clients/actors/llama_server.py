"""llama.cpp's own server with one model, until the input ends. The first line of output is its address."""

from __future__ import annotations

import sys

import xllamacpp


def main() -> None:
    """As the nodes that it is compared with: one thread, the same context, a KV cache of the same precision."""
    params = xllamacpp.CommonParams()
    params.model.path, name, context = sys.argv[1:]
    params.model_alias = {name}
    params.n_ctx = int(context)
    params.n_parallel = 4
    params.kv_unified = True
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_ram_mib = 0
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.use_jinja = True
    server = xllamacpp.Server(params)
    sys.stdout.write(server.listening_address + "\n")
    sys.stdout.flush()
    sys.stdin.read()


main()
