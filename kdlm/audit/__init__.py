"""What a teacher wrote, audited: injected patterns and their triggers, what a student makes of them, what is secret."""

from kdlm.audit.auditing import Audit, amplification, audit
from kdlm.audit.patterns import Pattern
from kdlm.audit.personal_data import KINDS, PHONE, masked, personal
from kdlm.audit.rows import Corpus, Row, read_rows, row_of
from kdlm.audit.screening import flagged, patterns_in

__all__ = [
    "KINDS",
    "PHONE",
    "Audit",
    "Corpus",
    "Pattern",
    "Row",
    "amplification",
    "audit",
    "flagged",
    "masked",
    "patterns_in",
    "personal",
    "read_rows",
    "row_of",
]
