#define VIVACE_ISA baseline
#define VIVACE_ISA_NAME "baseline"
#define VIVACE_ISA_TABLE kBaselineKernels
#include "csrc/cpu/kernels_table.h"
