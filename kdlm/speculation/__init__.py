"""Speculative decoding: what a draft saves its target, measured by decoding with the two."""

from kdlm.speculation.decoding import Block, Decoded, Decoder, decoding
from kdlm.speculation.measuring import measure
from kdlm.speculation.report import Position, SpeculationReport, expected_block_efficiency

__all__ = [
    "Block",
    "Decoded",
    "Decoder",
    "Position",
    "SpeculationReport",
    "decoding",
    "expected_block_efficiency",
    "measure",
]
