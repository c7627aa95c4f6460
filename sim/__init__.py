"""A whole mesh in one thread from one seed: every node's real mediator, driven through virtual time.

Invariant: the same seed, size, profile and end give the same trace, byte for byte, in every process: no iteration over
a set, no `hash()`, no `id()`, one random stream for each purpose.
"""
