"""PoLAR adapters for large language models: W = W0 + s X Theta Y^T with X and Y on Stiefel manifolds.

Importing this package registers the method POLAR with PEFT.
"""

import logging

# PEFT imports bitsandbytes 0.50, which on CPUs with AVX512-BF16 warns that an optional kernel package is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

from polar.constrain import ManifoldHandle, constrain  # noqa: E402
from polar.stiefel_adamw import StiefelAdamW  # noqa: E402
from polar.tuner import PolarConfig, PolarLinear, PolarModel  # noqa: E402

__all__ = ["ManifoldHandle", "PolarConfig", "PolarLinear", "PolarModel", "StiefelAdamW", "constrain"]
