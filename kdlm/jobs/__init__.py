"""Evaluation jobs: models judged side by side on lm-evaluation-harness."""
