"""A cache of layouts that lives as long as the test run, for its subprocesses too."""

from __future__ import annotations

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="qkguard-cache-")
os.environ["QKGUARD_CACHE"] = _CACHE.name
