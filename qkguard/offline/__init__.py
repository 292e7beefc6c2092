"""What works on finished checkpoints: restore, merge, drift, probe, sweep, inspect and verify.

May import `choice` and the rooms below it. Public: `restore.restore_checkpoint`, `merge.merge_adapter`,
`drift_report.drift_report`, `probe.probe_models`, `sweep.sweep`, `inspect.layout_report`, `verify.verify`.
"""
