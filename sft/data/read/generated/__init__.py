"""Problems made by rule, with worked reasoning: multi-step arithmetic, linear equations and short word problems."""

from sft.data.read.generated.chains import MAX_STEPS
from sft.data.read.generated.rows import generate_rows

__all__ = ["MAX_STEPS", "generate_rows"]
