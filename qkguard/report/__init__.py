"""What a run's files say, as sentences, pictures and one page: `qkguard report DIR`."""

from qkguard.report.build import write_report

__all__ = ["write_report"]
