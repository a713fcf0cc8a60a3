"""The command line: verbs parse, call one function and print."""

from mlxtune.cli.app import main

__all__ = ["main"]
