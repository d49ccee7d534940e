"""Guards against collapse: figures of a language model in training that warn, and then stop it with a checkpoint."""

from kdlm.guards.section import GuardsSection, Limit, Watched

__all__ = ["GuardsSection", "Limit", "Watched"]
