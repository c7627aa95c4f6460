"""meshnode: one private LLM endpoint from a handful of ordinary machines."""

__version__ = "0.1.0"
