"""Which weights to take: candidates, their swap into a live model, task loss, the verdict.

May import `report` and the rooms below it. Public: `candidates.method_candidates`, `swap.restored`, `task.score_rows`,
`verdict.recommend`.
"""
