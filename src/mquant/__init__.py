"""mquant: turn a mixture-of-experts checkpoint into a low-bit one that loads the first time."""

from importlib.metadata import version

__version__ = version("mquant")

__all__ = ["__version__"]
