#define NF_ISA   avx512vnni
#define NF_BYTES 64
#include "isa/instantiate.h"
