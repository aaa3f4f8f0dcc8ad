"""Our models behind the evaluation harness lm-eval."""
