#define NF_ISA   avx512vnni
#define NF_BYTES 64
#define NF_VNNI
#include "isa/instantiate.h"
