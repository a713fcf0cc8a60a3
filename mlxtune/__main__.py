"""`python -m mlxtune` is the same program as `mlxtune`."""

from mlxtune.cli import main

main()
