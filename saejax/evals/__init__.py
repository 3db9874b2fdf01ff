"""Evaluation: one file per family of metrics, and the jitted, sharded loop that fills them.

Fifth station of the pipeline. Every metric is a monoid of sums. So any batch size, padding, order of merging or number
of devices gives the same value. Every key that a metric produces carries its exact definition in one sentence.
"""
