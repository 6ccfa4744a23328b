"""What the operator library is, and which of its kernels run."""

import json

from vivace.ops._loaded import operators


def force_arch(arch: int) -> int:
    """Chooses the CUDA kernels for the whole process: 0 by the device, 80 mma.sync (sm_80 and newer), 90 Hopper's, -1
    the generic ones. The environment's VIVACE_ARCH is the initial value.

    Returns:
        The previous value.
    """
    return operators.force_arch(arch)


def build_info() -> dict:
    """What the operator library was built for: version, cuda (toolkit, or None for CPU only), architectures,
    torch_target (the oldest torch it runs with), torch_built, operators (version of the schemas)."""
    return json.loads(operators.build_info())
