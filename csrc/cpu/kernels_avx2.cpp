#define VIVACE_ISA avx2
#define VIVACE_ISA_NAME "avx2"
#define VIVACE_ISA_TABLE kAvx2Kernels
#include "csrc/cpu/kernels_table.h"
