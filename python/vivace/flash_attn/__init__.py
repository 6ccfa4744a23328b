"""flash-attn's Python functions, over our operators: `from vivace.flash_attn import flash_attn_func`.

Names, arguments, defaults and results are flash-attn 2.8's. For code that imports `flash_attn` itself:
`vivace.install_flash_attn_shim()`.
"""

from vivace.flash_attn import bert_padding
from vivace.flash_attn.functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_with_kvcache,
)
from vivace.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

#: The version of flash-attn whose interface this is.
__version__ = "2.8.3"

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
