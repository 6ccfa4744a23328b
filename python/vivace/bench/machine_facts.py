"""Which facts of a machine make figures comparable. No torch."""

#: Facts that make two machines different ones for a figure, and those that make two runs on one machine different.
MACHINE = ("device", "gpu", "memory_gib", "power_limit_w", "cpu", "threads")
VERSIONS = ("unit", "driver", "cuda", "cudnn", "torch", "vivace", "commit")


def differences(a: dict, b: dict, strict: bool = False) -> list[str]:
    """What tells the machines of two rows apart, of the facts that both have, in words; ``strict``: versions too."""
    names = (*MACHINE, *VERSIONS) if strict else MACHINE
    return [
        f"{name.removesuffix('_gib').replace('_', ' ')} {a[name]}, now {b[name]}"
        for name in names
        if name in a and name in b and a[name] != b[name]
    ]
