"""The command line, `fxprune`: one module per command, and what they share."""

from fxprune.cli.app import app, main

__all__ = ["app", "main"]
