"""The wire contract, read off the types that the nodes themselves use: schema, growth rules, golden vectors.

`python -m tools.export_schema` writes what these modules find into proto/; tests/proto holds that it is written.
"""
