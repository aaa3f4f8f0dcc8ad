"""Metrics of captions: torchmetrics that take `(texts, records)` and return `{name: {mean, se, n}}`."""
