"""The report: one self-contained HTML page and its pictures, computed from the files of a run.

`gearshift report RUN` and `gearshift demo` are its two users. Importing this package is cheap; matplotlib and jinja2
are imported when a report is made.
"""

from gearshift.launch.report.command import demo_report, folder_report, main

__all__ = ["demo_report", "folder_report", "main"]
