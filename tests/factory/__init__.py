"""The model factory: tiny random models that behave like real ones."""

from tests.factory.models import build

__all__ = ["build"]
