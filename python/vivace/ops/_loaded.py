"""torch.ops.vivace, once the operator library is loaded."""

import torch

from vivace import library

library.load()
operators = torch.ops.vivace
