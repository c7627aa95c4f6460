"""For all tests: nothing is judged by how long it takes on the machine at hand."""

from hypothesis import settings

settings.register_profile("meshnode", deadline=None)
settings.load_profile("meshnode")
