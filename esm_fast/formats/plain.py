"""float32 and bfloat16, prepacked: the same numbers in another order."""

from .format import Format
from .weight import DTYPES, PrepackedWeight

FORMATS = [Format(name, dtype, around=dtype, weight=PrepackedWeight) for name, dtype in DTYPES.items()]
