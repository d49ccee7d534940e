"""Verifiers: completion and reference -> a verdict."""
