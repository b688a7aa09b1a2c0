"""The report as one HTML file, made from the JSON of `verify`, `compare` and `eval`."""

from mquant.publish.html_report.sections import Evidence, render

__all__ = ["Evidence", "render"]
