/*
 * CPU features: the CPUID bits that offer instructions.
 *
 * Every row of the translator's instruction table names the feature that
 * offers it; cpuid.c decides which of them the guest is offered. An
 * instruction whose feature is not offered raises #UD.
 *
 * Some instructions act as something harmless where their feature is absent
 * (TZCNT as BSF, ENDBR64 as NOP): those rows say MV_FEAT_BASE or the feature
 * that a host which offers it always has.
 *
 * The bits are those of SDM 2A table 3-17 (CPUID) and APM 3 appendix E.
 */
#ifndef MV_FEATURES_H
#define MV_FEATURES_H

#include <stdbool.h>
#include <stdint.h>

enum mv_cpuid_reg { MV_CPUID_EAX, MV_CPUID_EBX, MV_CPUID_ECX, MV_CPUID_EDX };

/* X(name, leaf, subleaf, register, bit) */
#define MV_FEATURES(X)                                                                             \
  X(FPU, 0x1, 0, EDX, 0)                                                                           \
  X(TSC, 0x1, 0, EDX, 4)                                                                           \
  X(MSR, 0x1, 0, EDX, 5)                                                                           \
  X(CX8, 0x1, 0, EDX, 8)                                                                           \
  X(SEP, 0x1, 0, EDX, 11)                                                                          \
  X(CMOV, 0x1, 0, EDX, 15)                                                                         \
  X(CLFSH, 0x1, 0, EDX, 19)                                                                        \
  X(MMX, 0x1, 0, EDX, 23)                                                                          \
  X(FXSR, 0x1, 0, EDX, 24)                                                                         \
  X(SSE, 0x1, 0, EDX, 25)                                                                          \
  X(SSE2, 0x1, 0, EDX, 26)                                                                         \
  X(SSE3, 0x1, 0, ECX, 0)                                                                          \
  X(PCLMULQDQ, 0x1, 0, ECX, 1)                                                                     \
  X(MONITOR, 0x1, 0, ECX, 3)                                                                       \
  X(SSSE3, 0x1, 0, ECX, 9)                                                                         \
  X(FMA, 0x1, 0, ECX, 12)                                                                          \
  X(CX16, 0x1, 0, ECX, 13)                                                                         \
  X(SSE4_1, 0x1, 0, ECX, 19)                                                                       \
  X(SSE4_2, 0x1, 0, ECX, 20)                                                                       \
  X(MOVBE, 0x1, 0, ECX, 22)                                                                        \
  X(POPCNT, 0x1, 0, ECX, 23)                                                                       \
  X(AES, 0x1, 0, ECX, 25)                                                                          \
  X(XSAVE, 0x1, 0, ECX, 26)                                                                        \
  X(AVX, 0x1, 0, ECX, 28)                                                                          \
  X(F16C, 0x1, 0, ECX, 29)                                                                         \
  X(RDRAND, 0x1, 0, ECX, 30)                                                                       \
  X(FSGSBASE, 0x7, 0, EBX, 0)                                                                      \
  X(BMI1, 0x7, 0, EBX, 3)                                                                          \
  X(AVX2, 0x7, 0, EBX, 5)                                                                          \
  X(BMI2, 0x7, 0, EBX, 8)                                                                          \
  X(INVPCID, 0x7, 0, EBX, 10)                                                                      \
  X(RTM, 0x7, 0, EBX, 11)                                                                          \
  X(AVX512F, 0x7, 0, EBX, 16)                                                                      \
  X(AVX512DQ, 0x7, 0, EBX, 17)                                                                     \
  X(RDSEED, 0x7, 0, EBX, 18)                                                                       \
  X(ADX, 0x7, 0, EBX, 19)                                                                          \
  X(SMAP, 0x7, 0, EBX, 20)                                                                         \
  X(AVX512_IFMA, 0x7, 0, EBX, 21)                                                                  \
  X(CLFLUSHOPT, 0x7, 0, EBX, 23)                                                                   \
  X(CLWB, 0x7, 0, EBX, 24)                                                                         \
  X(AVX512CD, 0x7, 0, EBX, 28)                                                                     \
  X(SHA, 0x7, 0, EBX, 29)                                                                          \
  X(AVX512BW, 0x7, 0, EBX, 30)                                                                     \
  X(AVX512VL, 0x7, 0, EBX, 31)                                                                     \
  X(AVX512_VBMI, 0x7, 0, ECX, 1)                                                                   \
  X(PKU, 0x7, 0, ECX, 3)                                                                           \
  X(AVX512_VBMI2, 0x7, 0, ECX, 6)                                                                  \
  X(GFNI, 0x7, 0, ECX, 8)                                                                          \
  X(VAES, 0x7, 0, ECX, 9)                                                                          \
  X(VPCLMULQDQ, 0x7, 0, ECX, 10)                                                                   \
  X(AVX512_VNNI, 0x7, 0, ECX, 11)                                                                  \
  X(AVX512_BITALG, 0x7, 0, ECX, 12)                                                                \
  X(AVX512_VPOPCNTDQ, 0x7, 0, ECX, 14)                                                             \
  X(RDPID, 0x7, 0, ECX, 22)                                                                        \
  X(MOVDIRI, 0x7, 0, ECX, 27)                                                                      \
  X(AVX512_VP2INTERSECT, 0x7, 0, EDX, 8)                                                           \
  X(SERIALIZE, 0x7, 0, EDX, 14)                                                                    \
  X(AVX512_FP16, 0x7, 0, EDX, 23)                                                                  \
  X(AVX_VNNI, 0x7, 1, EAX, 4)                                                                      \
  X(AVX512_BF16, 0x7, 1, EAX, 5)                                                                   \
  X(XSAVEOPT, 0xd, 1, EAX, 0)                                                                      \
  X(XSAVEC, 0xd, 1, EAX, 1)                                                                        \
  X(XSAVES, 0xd, 1, EAX, 3)                                                                        \
  X(LAHF_LM, 0x80000001, 0, ECX, 0)                                                                \
  X(LZCNT, 0x80000001, 0, ECX, 5)                                                                  \
  X(SYSCALL, 0x80000001, 0, EDX, 11)                                                               \
  X(RDTSCP, 0x80000001, 0, EDX, 27)

enum mv_feature {
  MV_FEAT_BASE = 0, /* always there                                          */
#define X(name, leaf, subleaf, reg, bit) MV_FEAT_##name,
  MV_FEATURES(X)
#undef X
      MV_FEAT_COUNT
};

struct mv_feature_bit {
  uint32_t leaf, subleaf;
  uint8_t reg; /* enum mv_cpuid_reg                                          */
  uint8_t bit;
};

/* Where a feature's bit lies, by enum mv_feature (features.c). BASE has leaf 0. */
extern const struct mv_feature_bit mv_feature_bits[MV_FEAT_COUNT];

/* Is the feature offered to guests? BASE always is (cpuid.c). */
bool mv_feature_offered(enum mv_feature feature);

#endif
