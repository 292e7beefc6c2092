"""`sweep`: which restore keeps recall and skill on a run, by measurement."""

from qkguard.sweeping.run import SweepReport, sweep

__all__ = ["SweepReport", "sweep"]
