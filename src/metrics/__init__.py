"""Metrics of responses: torchmetrics whose `compute` returns `{name: {mean, se, n}}`, most over `(texts, records)`."""
