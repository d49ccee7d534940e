"""Differential privacy: what a student may tell of any one training row is bounded, and the bound is written down."""

from kdlm.privacy.section import PrivacySection, promise

__all__ = ["PrivacySection", "promise"]
