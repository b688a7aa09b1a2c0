"""The report as one HTML file, made from the JSON of `verify`, `compare` and `eval`."""

from mquant.publish.page.sections import Evidence, render

__all__ = ["Evidence", "render"]
