"""`qkguard demo`: the whole guard on a small hybrid that ships with the package.

May import `training` and the rooms below it. Public: `run.run_demo`, `run.DemoSettings`, `show.table`.
"""

from qkguard.demo.run import MODEL, DemoReport, DemoSettings, run_demo

__all__ = ["MODEL", "DemoReport", "DemoSettings", "run_demo"]
