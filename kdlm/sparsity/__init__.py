"""Sparse students: weights are pruned by a schedule, and stay zero while any method trains and when it is done."""

from kdlm.sparsity.section import SparsitySection

__all__ = ["SparsitySection"]
