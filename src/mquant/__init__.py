"""mquant: turn a mixture-of-experts checkpoint into a low-bit one that loads the first time."""

__version__: str


def __getattr__(name: str) -> str:
    """Read the version when it is asked for: a slow import would come before signal handlers."""
    if name != "__version__":
        raise AttributeError(name)
    from importlib.metadata import version

    globals()[name] = found = version("mquant")
    return found


__all__ = ["__version__"]
