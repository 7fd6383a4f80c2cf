/* Counter-based random numbers: Philox 4x32 of ten rounds (Salmon et al. 2011). The numbers are
   a function of key and index alone, so that any part of a stream can be made again, in any
   order, on any number of threads.

   Element i of a stream has one number of 32 bits. Elements go in blocks of 64: a block takes
   16 counters, of which number i % 16 gives the four words i, i + 16, i + 32 and i + 48 of
   the block, so that a vector of any width holds neighbours. */
#ifndef NF_PHILOX_H
#define NF_PHILOX_H
#include <stdint.h>

enum { NF_PHILOX_BLOCK = 64, NF_PHILOX_COUNTERS = 16, NF_PHILOX_ROUNDS = 10 };

#define NF_PHILOX_MULTIPLIER_0 0xD2511F53u
#define NF_PHILOX_MULTIPLIER_1 0xCD9E8D57u
#define NF_PHILOX_KEY_STEP_0   0x9E3779B9u
#define NF_PHILOX_KEY_STEP_1   0xBB67AE85u

/* A counter of four words becomes its four numbers. */
static inline void
nf_philox_rounds(uint64_t key, uint32_t word[4])
{
    uint32_t a = word[0], b = word[1], c = word[2], d = word[3];
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < NF_PHILOX_ROUNDS; round++) {
        const uint64_t p0 = (uint64_t)NF_PHILOX_MULTIPLIER_0 * a;
        const uint64_t p1 = (uint64_t)NF_PHILOX_MULTIPLIER_1 * c;
        a = (uint32_t)(p1 >> 32) ^ b ^ k0;
        b = (uint32_t)p1;
        c = (uint32_t)(p0 >> 32) ^ d ^ k1;
        d = (uint32_t)p0;
        k0 += NF_PHILOX_KEY_STEP_0;
        k1 += NF_PHILOX_KEY_STEP_1;
    }
    word[0] = a, word[1] = b, word[2] = c, word[3] = d;
}

/* The four words of a counter. */
static inline void
nf_philox(uint64_t key, uint64_t counter, uint32_t word[4])
{
    word[0] = (uint32_t)counter, word[1] = (uint32_t)(counter >> 32);
    word[2] = word[3] = 0;
    nf_philox_rounds(key, word);
}

/* The number of element i. */
static inline uint32_t
nf_philox_element(uint64_t key, uint64_t i)
{
    uint32_t word[4];
    nf_philox(key, i / NF_PHILOX_BLOCK * NF_PHILOX_COUNTERS + i % NF_PHILOX_COUNTERS, word);
    return word[i % NF_PHILOX_BLOCK / NF_PHILOX_COUNTERS];
}

#endif
