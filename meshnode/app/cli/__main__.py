"""`python -m meshnode.app.cli`: the same as `meshnode`, for children that must use this very interpreter."""

from meshnode.app.cli import main

main()
