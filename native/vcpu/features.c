/* Where each CPU feature's CPUID bit lies (mv/features.h holds the list). */
#include "mv/features.h"

const struct mv_feature_bit mv_feature_bits[MV_FEAT_COUNT] = {
#define X(name, leaf, subleaf, reg, bit) [MV_FEAT_##name] = {leaf, subleaf, MV_CPUID_##reg, bit},
    MV_FEATURES(X)
#undef X
};
