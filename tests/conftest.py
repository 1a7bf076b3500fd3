"""Fixtures that every test may ask for."""

from hub_server import hub

__all__ = ["hub"]
