"""Sparse students: weights that are pruned by a schedule, stay zero while any method trains, and are exported as such."""

from kdlm.sparsity.section import SparsitySection

__all__ = ["SparsitySection"]
