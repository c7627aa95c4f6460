"""The model factory: tiny random models that behave like real ones."""

from tests.factory.models import build, quantize

__all__ = ["build", "quantize"]
