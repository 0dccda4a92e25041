"""Fixtures of the adapters' tests."""

from adapter_servers import adapter_file, serve

__all__ = ["adapter_file", "serve"]
