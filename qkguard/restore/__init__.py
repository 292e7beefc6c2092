"""The restore methods: pure functions from a layer's rows before and after SFT to the rows to write.

A method gets `(spec, maps, pre, post, **options)`: the layer, its selected parameters, and for each parameter name the
compact tensors before SFT (in the dtype they were kept in) and after (in the checkpoint's dtype). It returns the new
compact tensors in any float dtype, rounded once when they are written, and what it did, for the manifest.
"""

from __future__ import annotations

from qkguard.restore.apply import check_device, restore_layer
from qkguard.restore.interpolate import interpolate
from qkguard.restore.plain import Restored, restore
from qkguard.restore.procrustes import procrustes
from qkguard.restore.qk_pro import qk_pro
from qkguard.restore.registry import METHODS, Method, check_options, check_per_layer, get_method

__all__ = [
    "METHODS",
    "Method",
    "Restored",
    "check_device",
    "check_options",
    "check_per_layer",
    "get_method",
    "interpolate",
    "procrustes",
    "qk_pro",
    "restore",
    "restore_layer",
]
