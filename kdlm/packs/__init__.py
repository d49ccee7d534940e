"""Packs: what tuning changed in a model, compressed; merged into plain models, or switched on a live one."""

from kdlm.packs.folder import Pack
from kdlm.packs.merging import merge
from kdlm.packs.packing import pack
from kdlm.packs.routing import Router

__all__ = ["Pack", "Router", "merge", "pack"]
