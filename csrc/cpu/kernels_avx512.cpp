#define VIVACE_ISA avx512
#define VIVACE_ISA_NAME "avx512"
#define VIVACE_ISA_TABLE kAvx512Kernels
#include "csrc/cpu/kernels_table.h"
