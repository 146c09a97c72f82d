"""The version, which keys of stored results hold."""

__version__ = "0.1.0"
