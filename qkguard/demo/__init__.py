"""`qkguard demo`: the whole guard on a small hybrid that ships with the package, in minutes on a CPU."""

from qkguard.demo.run import MODEL, DemoReport, DemoSettings, run_demo

__all__ = ["MODEL", "DemoReport", "DemoSettings", "run_demo"]
