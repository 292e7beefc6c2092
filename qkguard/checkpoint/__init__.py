"""Folders and files: rows read, restored folders written, manifest, card, reference file.

May import `probe` and the rooms below it. Public: `weights.open_weights`, `restored.plan_restored`,
`write.write_folder`, `manifest.load_manifest`, `card.model_card`.
"""
