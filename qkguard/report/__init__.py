"""A run read back from its files and shown: sentences, pictures, pages.

May import `adapters` and what is below it. Public: `build.write_report`, `run.load_run`.
"""
