"""Diagnosis before training: how far text resembles itself, how far back gradients on attention reach.

Pure: no settings, no pages, no files. May import `probe` and the rooms below it. Public: `measure.measure`,
`logit_gradients.LogitGradients`, `self_similarity.self_similarity`, `curves.decay_length`. A row of text goes through
`self_similarity` (its embeddings) and `logit_gradients` (one forward and backward pass); `measure` leads all rows
through and makes estimates of what `curves` add up.
"""
