"""`qkguard demo`: the whole guard on a small hybrid that ships with the package.

May import `training` and the rooms below it. Public: `run.run_demo`, `settings.DemoSettings`, `show.table`.
"""

from qkguard.demo.run import MODEL, DemoReport, run_demo
from qkguard.demo.settings import DemoSettings

__all__ = ["MODEL", "DemoReport", "DemoSettings", "run_demo"]
