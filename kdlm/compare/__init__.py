"""`kdlm compare`: several recipes on the same seeds, one table; and a search over the keys of one."""

from kdlm.compare.comparing import compare
from kdlm.compare.sections import Comparison
from kdlm.compare.table import ranked

__all__ = ["Comparison", "compare", "ranked"]
