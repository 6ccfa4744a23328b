"""`vivace bench` in two stages, for steps that are started side by side and measured one after the other.

    python gpu_bench.py FD SUBJECT FLAG...

does its imports, closes the file descriptor FD, and measures when a line comes in on stdin; at its end it goes.
"""

import contextlib
import importlib
import os
import sys

#: What the subjects import later, each where it is there.
LATER = {
    "attention": ("torch.nn.attention.varlen",),
    "step": ("transformers.models.llama.modeling_llama", "torch._dynamo", "torch._inductor.compile_fx", "triton"),
    "generate": ("vivace.t3",),
}


def main():
    ready, arguments = int(sys.argv[1]), sys.argv[2:]
    importlib.import_module(f"vivace.bench.{arguments[0]}")
    for name in LATER[arguments[0]]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from vivace import cli

    os.close(ready)
    return cli.main(["bench", *arguments]) if sys.stdin.readline() else 0


if __name__ == "__main__":
    sys.exit(main())
