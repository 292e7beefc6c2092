"""A run's files read back and shown: sentences, pictures and pages.

May import `adapters` and the rooms below it. Public: `run.load_run`, `sentences.describe`, `run_page.write_report`,
`run_page.write_comparison`, `page.render`.
"""
