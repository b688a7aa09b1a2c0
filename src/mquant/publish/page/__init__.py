"""A report as one HTML file: JSON of `verify`, `compare` and `eval` in, a page out."""

from mquant.publish.page.report import Evidence, render

__all__ = ["Evidence", "render"]
