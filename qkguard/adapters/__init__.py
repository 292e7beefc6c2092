"""PEFT: adapter files, effective weights, drift from factors, scaling in the live model.

May import `checkpoint` and the rooms below it. Public: `files.open_adapter`, `restored.write_restored_adapter`,
`live.adapted_weights`, `scaled.scaled_adapters`.
"""
