"""Which pixel a feature cell looks at: the only place with stride arithmetic."""

from __future__ import annotations

IGNORE = 255  # the label of a pixel that counts nowhere: not in the losses, not in the metrics, not in the push
OUTPUT_STRIDE = 8  # pixels from one feature cell to the next
