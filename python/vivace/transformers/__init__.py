"""vivace inside Hugging Face transformers, from 4.46 on: `attn_implementation="vivace"`.

    register()      makes the name known, and nothing else
    unregister()    takes it away again
    explain(model)  which implementation each attention layer of a model uses, and why

`vivace.enable` goes further: it makes new models choose ours, or serves the name flash_attention_2.
(Inside this package `import transformers` is Hugging Face's: imports are absolute.)
"""

from vivace.transformers.explain import explain
from vivace.transformers.registry import NAME, register, registered, unregister

__all__ = ["NAME", "explain", "register", "registered", "unregister"]
