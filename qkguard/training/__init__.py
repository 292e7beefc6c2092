"""The callback: reference, drift, recall, metrics and restored checkpoints while a model trains.

May import `offline` and the rooms below it. Public: `callback.QKGuardCallback`, `config.QKGuardConfig`.
"""
