/*
 * CPUID as guests see it.
 *
 * Goal: a guest must find only what works. KVM passes through what the silicon
 * has; the translator copies instructions to the host's silicon, so it offers
 * a subset of the host's, less what it does not do right (privileged extras,
 * vector registers that it does not switch).
 *
 * `rules` below is the one list of feature bits. A bit is offered if the source
 * (KVM_GET_SUPPORTED_CPUID, or the host's own CPUID) has it and the column of
 * the backend lists it; bits in `always` are emulated by us whatever the source
 * says. All else is structure: topology (one thread a core, one package), the
 * XSAVE area, caches, the hypervisor's leaves.
 *
 * A nested host takes microseconds for one CPUID, so the host's leaves are read
 * once a process, and only those that are used.
 *
 * Mitigations: a guest's defences against speculation cost much under a
 * translator (PTI alone doubles its page-table switches) and defend nothing
 * there, because translated code does not speculate across the borders that
 * they guard in the way they assume; side channels are outside our threat model.
 * So the translator's column says, where a bit for it exists, that the CPU is
 * not concerned (ARCH_CAPABILITIES in msr.c, AutoIBRS, BTC_NO, SRSO_NO).
 */
#pragma GCC target("general-regs-only")
#include "mv/cpuid.h"

#include <cpuid.h>
#include <stdatomic.h>
#include <stddef.h>

#include "mv/layout.h"

#define BIT(n) (1u << (n))

/* AVX-512 on the translator: needs zmm and opmask in its vector state.
 * 1 offers it. */
#define MV_DBT_AVX512 0

#define AVX512_7_EBX    (BIT(16) | BIT(17) | BIT(21) | BIT(28) | BIT(30) | BIT(31))
#define AVX512_7_ECX    (BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14))
#define AVX512_7_EDX    (BIT(8) | BIT(23))
#define AVX512_71_EAX   BIT(5)
#define IF_AVX512(bits) (MV_DBT_AVX512 ? (bits) : 0)

#define XCR0_DBT (0x7u | IF_AVX512(0xe0u))
#define XCR0_KVM 0xe7u /* x87, SSE, AVX, AVX-512: fits struct mv_vcpu_state    */

/* Leaf 1 ECX: SSE3 PCLMULQDQ SSSE3 FMA CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES
 * XSAVE AVX F16C RDRAND. KVM adds PCID. */
#define L1_ECX                                                                                     \
  (BIT(0) | BIT(1) | BIT(9) | BIT(12) | BIT(13) | BIT(19) | BIT(20) | BIT(22) | BIT(23) |          \
   BIT(25) | BIT(26) | BIT(28) | BIT(29) | BIT(30))
/* x2APIC, TSC deadline, hypervisor present. */
#define L1_ECX_ALWAYS (BIT(21) | BIT(24) | BIT(31))
/* FPU DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH
 * MMX FXSR SSE SSE2. KVM adds VME and self-snoop. */
#define L1_EDX                                                                                     \
  (BIT(0) | BIT(2) | BIT(3) | BIT(4) | BIT(5) | BIT(6) | BIT(7) | BIT(8) | BIT(9) | BIT(11) |      \
   BIT(12) | BIT(13) | BIT(14) | BIT(15) | BIT(16) | BIT(17) | BIT(19) | BIT(23) | BIT(24) |       \
   BIT(25) | BIT(26))
/* FSGSBASE BMI1 AVX2 BMI2 ERMS RDSEED ADX CLFLUSHOPT CLWB SHA. KVM adds SMEP
 * INVPCID SMAP. */
#define L7_EBX                                                                                     \
  (BIT(0) | BIT(3) | BIT(5) | BIT(8) | BIT(9) | BIT(18) | BIT(19) | BIT(23) | BIT(24) | BIT(29))
#define L7_EBX_ALWAYS BIT(1) /* TSC_ADJUST                                     */
/* GFNI VAES VPCLMULQDQ RDPID. KVM adds UMIP. */
#define L7_ECX (BIT(8) | BIT(9) | BIT(10) | BIT(22))
/* FSRM SERIALIZE. */
#define L7_EDX (BIT(4) | BIT(14))
/* SPEC_CTRL and ARCH_CAPABILITIES; KVM also STIBP, MD_CLEAR, FLUSH_L1D, SSBD. */
#define L7_EDX_SPEC     (BIT(26) | BIT(29))
#define L7_EDX_SPEC_KVM (L7_EDX_SPEC | BIT(10) | BIT(27) | BIT(28) | BIT(31))
/* LAHF_LM LZCNT PREFETCHW. KVM adds SSE4A, MISALIGNSSE. */
#define X1_ECX (BIT(0) | BIT(5) | BIT(8))
/* SYSCALL NX MMXEXT 1-GiB-pages RDTSCP LM. */
#define X1_EDX (BIT(11) | BIT(20) | BIT(22) | BIT(26) | BIT(27) | BIT(29))
/* AMD repeats leaf 1 EDX here (APM 3 E.4.2). */
#define X1_EDX_ALIAS 0x0183f3ffu
/* CLZERO, and AMD's speculation bits, which KVM passes. */
#define X8_EBX_KVM (BIT(0) | BIT(12) | BIT(14) | BIT(15) | BIT(24) | BIT(26) | BIT(29))
/* SSB_NO, BTC_NO. */
#define X8_EBX_DBT (BIT(26) | BIT(29))
/* No nested data breakpoints, LFENCE serialises, null selector clears base,
 * AutoIBRS, SRSO_NO. */
#define X21_EAX    (BIT(0) | BIT(2) | BIT(6))
#define X21_EAX_NO (BIT(8) | BIT(29))

struct rule {
  uint32_t leaf, subleaf;
  uint8_t reg;
  uint32_t allow[2];  /* [KVM], [DBT]: offered if the source has them          */
  uint32_t always[2]; /* offered whatever the source has                       */
};

enum { EAX = MV_CPUID_EAX, EBX = MV_CPUID_EBX, ECX = MV_CPUID_ECX, EDX = MV_CPUID_EDX };

/* clang-format off */
static const struct rule rules[] = {
  {0x1, 0, ECX, {L1_ECX | BIT(17), L1_ECX}, {L1_ECX_ALWAYS, L1_ECX_ALWAYS}},
  {0x1, 0, EDX, {L1_EDX | BIT(1) | BIT(27), L1_EDX}, {0, 0}},
  {0x6, 0, EAX, {0, 0}, {BIT(2), BIT(2)}}, /* ARAT: the timer never stops      */
  {0x7, 0, EBX, {L7_EBX | BIT(7) | BIT(10) | BIT(20) | AVX512_7_EBX,
                 L7_EBX | IF_AVX512(AVX512_7_EBX)}, {0, L7_EBX_ALWAYS}},
  {0x7, 0, ECX, {L7_ECX | BIT(2) | AVX512_7_ECX, L7_ECX | IF_AVX512(AVX512_7_ECX)}, {0, 0}},
  {0x7, 0, EDX, {L7_EDX | L7_EDX_SPEC_KVM | AVX512_7_EDX,
                 L7_EDX | IF_AVX512(AVX512_7_EDX)}, {0, L7_EDX_SPEC}},
  {0x7, 1, EAX, {BIT(4) | AVX512_71_EAX, BIT(4) | IF_AVX512(AVX512_71_EAX)}, {0, 0}},
  {0xd, 1, EAX, {BIT(0) | BIT(1) | BIT(2), BIT(0) | BIT(1)}, {0, 0}},
  {0x80000001, 0, ECX, {X1_ECX | BIT(6) | BIT(7), X1_ECX}, {0, 0}},
  {0x80000001, 0, EDX, {X1_EDX | X1_EDX_ALIAS, X1_EDX | (X1_EDX_ALIAS & L1_EDX)}, {0, 0}},
  {0x80000007, 0, EDX, {BIT(8), BIT(8)}, {0, 0}}, /* invariant TSC             */
  {0x80000008, 0, EBX, {X8_EBX_KVM, 0}, {0, X8_EBX_DBT}},
  {0x80000021, 0, EAX, {X21_EAX | X21_EAX_NO, X21_EAX}, {0, X21_EAX_NO}},
};
/* clang-format on */

/* KVM_FEATURE_*: NOP_IO_DELAY, CLOCKSOURCE2, CLOCKSOURCE_STABLE_BIT. */
#define HV_FEATURES (BIT(1) | BIT(3) | BIT(24))

#define VENDOR_AMD_EBX   0x68747541u /* "Auth"                                  */
#define VENDOR_HYGON_EBX 0x6f677948u /* "Hygo"                                  */

/* ---- where bits come from --------------------------------------------- */

struct leaf {
  uint32_t leaf, subleaf, r[4];
};

/* The leaves of the host that we use. All other leaves read as zero. */
/* Order matters to host_read: the maxima first, 0xd.0 at HOST_XSAVE. */
static const uint32_t host_wanted[][2] = {
    {0x0, 0},        {0x1, 0},        {0x2, 0},        {0x7, 0},        {0x7, 1},
    {0xd, 0},        {0xd, 1},        {0xd, 2},        {0xd, 5},        {0xd, 6},
    {0xd, 7},        {0x4, 0},        {0x4, 1},        {0x4, 2},        {0x4, 3},
    {0x80000000, 0}, {0x80000001, 0}, {0x80000002, 0}, {0x80000003, 0}, {0x80000004, 0},
    {0x80000005, 0}, {0x80000006, 0}, {0x80000007, 0}, {0x80000008, 0}, {0x80000021, 0},
};
#define HOST_XSAVE  5
#define HOST_LEAVES (sizeof(host_wanted) / sizeof(host_wanted[0]))
static struct leaf host[HOST_LEAVES];
static _Atomic int host_state; /* 0 not read, 1 being read, 2 read              */

static bool is_amd_vendor(uint32_t ebx) {
  return ebx == VENDOR_AMD_EBX || ebx == VENDOR_HYGON_EBX;
}

static void host_read(void) {
  uint32_t max = 0, xmax = 0;
  bool amd = false, end_of_caches = false;
  for (unsigned i = 0; i < HOST_LEAVES; i++) {
    struct leaf *l = &host[i];
    l->leaf = host_wanted[i][0];
    l->subleaf = host_wanted[i][1];
    bool extended = l->leaf >= 0x80000000u;
    bool wanted = (i == 0 || l->leaf == 0x80000000u || l->leaf <= (extended ? xmax : max)) &&
                  (l->leaf != 0x4 || (!amd && !end_of_caches)) && (l->leaf != 0x2 || !amd) &&
                  (l->leaf != 0x80000005u || amd) &&
                  (l->leaf != 0xd || l->subleaf < 2 || (host[HOST_XSAVE].r[EAX] >> l->subleaf & 1));
    if (!wanted)
      continue;
    __cpuid_count(l->leaf, l->subleaf, l->r[EAX], l->r[EBX], l->r[ECX], l->r[EDX]);
    if (l->leaf == 0x0) {
      max = l->r[EAX];
      amd = is_amd_vendor(l->r[EBX]);
    } else if (l->leaf == 0x80000000u) {
      xmax = l->r[EAX];
    } else if (l->leaf == 0x4) {
      end_of_caches = (l->r[EAX] & 0x1f) == 0;
    }
  }
}

static void host_init(void) {
  int none = 0;
  if (atomic_load_explicit(&host_state, memory_order_acquire) == 2)
    return;
  if (atomic_compare_exchange_strong(&host_state, &none, 1)) {
    host_read();
    atomic_store_explicit(&host_state, 2, memory_order_release);
  }
  while (atomic_load_explicit(&host_state, memory_order_acquire) != 2)
    __builtin_ia32_pause();
}

static const uint32_t *source_leaf(const struct kvm_cpuid2 *supported, uint32_t leaf,
                                   uint32_t subleaf) {
  static const uint32_t zero[4];
  if (!supported) {
    for (unsigned i = 0; i < HOST_LEAVES; i++)
      if (host[i].leaf == leaf && host[i].subleaf == subleaf)
        return host[i].r;
    return zero;
  }
  for (unsigned i = 0; i < supported->nent; i++) {
    const struct kvm_cpuid_entry2 *e = &supported->entries[i];
    bool indexed = e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    if (e->function == leaf && (!indexed || e->index == subleaf))
      return &e->eax;
  }
  return zero;
}
_Static_assert(offsetof(struct kvm_cpuid_entry2, edx) ==
                   offsetof(struct kvm_cpuid_entry2, eax) + 12,
               "eax, ebx, ecx, edx lie in a row");

/* ---- the table --------------------------------------------------------- */

struct build {
  struct kvm_cpuid_entry2 *out;
  unsigned n, max;
  enum mv_cpuid_backend backend;
  const struct kvm_cpuid2 *supported;
  unsigned ncpus, apic_id, core_bits;
  bool amd, full;
};

static uint32_t ruled(const struct build *b, uint32_t leaf, uint32_t subleaf, unsigned reg) {
  for (unsigned i = 0; i < sizeof(rules) / sizeof(rules[0]); i++) {
    const struct rule *r = &rules[i];
    if (r->leaf != leaf || r->subleaf != subleaf || r->reg != reg)
      continue;
    enum mv_cpuid_backend by = b->backend == MV_CPUID_DBT ? MV_CPUID_DBT : MV_CPUID_KVM;
    uint32_t bits = source_leaf(b->supported, leaf, subleaf)[reg] & r->allow[by];
    bits |= r->always[by];
    if (b->backend == MV_CPUID_BOTH)
      bits &= r->allow[MV_CPUID_DBT] | r->always[MV_CPUID_DBT];
    return bits;
  }
  return 0;
}

static void put(struct build *b, uint32_t leaf, uint32_t subleaf, bool indexed, uint32_t eax,
                uint32_t ebx, uint32_t ecx, uint32_t edx) {
  if (b->n == b->max) {
    b->full = true;
    return;
  }
  b->out[b->n++] = (struct kvm_cpuid_entry2){
      .function = leaf,
      .index = subleaf,
      .flags = indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0,
      .eax = eax,
      .ebx = ebx,
      .ecx = ecx,
      .edx = edx,
  };
}

static void put_source(struct build *b, uint32_t leaf) {
  const uint32_t *s = source_leaf(b->supported, leaf, 0);
  put(b, leaf, 0, false, s[EAX], s[EBX], s[ECX], s[EDX]);
}

static void put_basic(struct build *b, uint32_t max) {
  const uint32_t *s = source_leaf(b->supported, 0x0, 0);
  put(b, 0x0, 0, false, max, s[EBX], s[ECX], s[EDX]);
  s = source_leaf(b->supported, 0x1, 0);
  /* EBX: APIC id, logical CPUs, CLFLUSH size in 8 bytes; EDX 28: more than one. */
  put(b, 0x1, 0, false, s[EAX], b->apic_id << 24 | b->ncpus << 16 | 8u << 8, ruled(b, 0x1, 0, ECX),
      ruled(b, 0x1, 0, EDX) | (b->ncpus > 1 ? BIT(28) : 0));
  if (!b->amd)
    put_source(b, 0x2);
}

/* Leaf 4: the caches, all shared by one logical CPU only. */
static void put_caches(struct build *b) {
  for (unsigned i = 0; i < 4 && !b->amd; i++) {
    const uint32_t *s = source_leaf(b->supported, 0x4, i);
    uint32_t cores = (1u << b->core_bits) - 1;
    if ((s[EAX] & 0x1f) == 0) {
      put(b, 0x4, i, true, 0, 0, 0, 0);
      return;
    }
    put(b, 0x4, i, true, (s[EAX] & 0x3fff) | cores << 26, s[EBX], s[ECX], s[EDX]);
  }
}

static void put_features(struct build *b) {
  uint32_t intel_only = b->amd && b->backend == MV_CPUID_DBT ? L7_EDX_SPEC : 0;
  put(b, 0x6, 0, false, ruled(b, 0x6, 0, EAX), 0, 0, 0);
  put(b, 0x7, 0, true, 1, ruled(b, 0x7, 0, EBX), ruled(b, 0x7, 0, ECX),
      ruled(b, 0x7, 0, EDX) & ~intel_only);
  put(b, 0x7, 1, true, ruled(b, 0x7, 1, EAX), 0, 0, 0);
}

/* Leaf 0xB, SDM 2A: level 0 is SMT (one thread a core), level 1 the cores. */
static void put_topology(struct build *b) {
  put(b, 0xb, 0, true, 0, 1, 1u << 8 | 0, b->apic_id);
  put(b, 0xb, 1, true, b->core_bits, b->ncpus, 2u << 8 | 1, b->apic_id);
  put(b, 0xb, 2, true, 0, 0, 2, b->apic_id);
}

static uint32_t offered_xcr0(const struct build *b) {
  if (!(ruled(b, 0x1, 0, ECX) & BIT(26)))
    return 0;
  uint32_t mask = b->backend == MV_CPUID_KVM ? XCR0_KVM : XCR0_DBT;
  mask &= source_leaf(b->supported, 0xd, 0)[EAX];
  return (mask & 0xe0) == 0xe0 ? mask : mask & ~0xe0u;
}

static void put_xsave(struct build *b) {
  uint32_t xcr0 = offered_xcr0(b), standard = 576, compacted = 576;
  if (!xcr0)
    return;
  for (unsigned i = 2; i < 8; i++) {
    const uint32_t *s = source_leaf(b->supported, 0xd, i);
    if (!(xcr0 >> i & 1))
      continue;
    if (s[EBX] + s[EAX] > standard)
      standard = s[EBX] + s[EAX];
    compacted += s[EAX];
  }
  put(b, 0xd, 0, true, xcr0, standard, standard, 0);
  put(b, 0xd, 1, true, ruled(b, 0xd, 1, EAX), compacted, 0, 0);
  for (unsigned i = 2; i < 8; i++) {
    const uint32_t *s = source_leaf(b->supported, 0xd, i);
    if (xcr0 >> i & 1)
      put(b, 0xd, i, true, s[EAX], s[EBX], 0, 0);
  }
}

static void put_hypervisor(struct build *b) {
  bool dbt = b->backend == MV_CPUID_DBT;
  put(b, MV_CPUID_HV_BASE, 0, false, dbt ? MV_CPUID_HV_TIMING : MV_CPUID_HV_FEATURES, 0x4b4d564b,
      0x564b4d56, 0x4d); /* "KVMKVMKVM\0\0\0"                                    */
  uint32_t features = HV_FEATURES;
  if (!dbt)
    features &= source_leaf(b->supported, MV_CPUID_HV_FEATURES, 0)[EAX];
  put(b, MV_CPUID_HV_FEATURES, 0, false, features, 0, 0, 0);
  /* EAX, the TSC's frequency, is put in by whoever knows it (system.c). */
  if (dbt)
    put(b, MV_CPUID_HV_TIMING, 0, false, 0, MV_LAPIC_TIMER_KHZ, 0, 0);
}

/* Physical address bits: the host's; at most 46 on the translator. */
static uint32_t address_sizes(const struct build *b) {
  uint32_t phys = source_leaf(b->supported, 0x80000008u, 0)[EAX] & 0xff;
  if (phys < 36)
    phys = 36;
  if (b->backend != MV_CPUID_KVM && phys > 46)
    phys = 46;
  return phys | 48u << 8;
}

static void put_extended(struct build *b) {
  const uint32_t *s = source_leaf(b->supported, 0x0, 0);
  put(b, 0x80000000u, 0, false, b->amd ? 0x80000021u : 0x80000008u, s[EBX], s[ECX], s[EDX]);
  uint32_t signature = b->amd ? source_leaf(b->supported, 0x80000001u, 0)[EAX] : 0;
  uint32_t edx = ruled(b, 0x80000001u, 0, EDX) & ~(b->amd ? 0 : X1_EDX_ALIAS);
  put(b, 0x80000001u, 0, false, signature, 0, ruled(b, 0x80000001u, 0, ECX), edx);
  for (uint32_t leaf = 0x80000002u; leaf <= 0x80000006u; leaf++)
    put_source(b, leaf);
  put(b, 0x80000007u, 0, false, 0, 0, 0, ruled(b, 0x80000007u, 0, EDX));
  /* ECX: cores less one, and the width of the core id in the APIC id. */
  put(b, 0x80000008u, 0, false, address_sizes(b), b->amd ? ruled(b, 0x80000008u, 0, EBX) : 0,
      b->amd ? (b->ncpus - 1) | b->core_bits << 12 : 0, 0);
  if (b->amd)
    put(b, 0x80000021u, 0, false, ruled(b, 0x80000021u, 0, EAX), 0, 0, 0);
}

unsigned mv_cpuid_build(struct kvm_cpuid_entry2 *out, unsigned max, enum mv_cpuid_backend backend,
                        unsigned ncpus, unsigned apic_id, const struct kvm_cpuid2 *supported) {
  struct build b = {.out = out,
                    .max = max,
                    .backend = backend,
                    .supported = supported,
                    .ncpus = ncpus,
                    .apic_id = apic_id};
  host_init();
  while ((1u << b.core_bits) < ncpus)
    b.core_bits++;
  b.amd = is_amd_vendor(source_leaf(supported, 0x0, 0)[EBX]);
  put_basic(&b, 0xd);
  put_caches(&b);
  put_features(&b);
  put_topology(&b);
  put_xsave(&b);
  put_hypervisor(&b);
  put_extended(&b);
  return b.full ? 0 : b.n;
}

/* ---- questions --------------------------------------------------------- */

static const struct kvm_cpuid_entry2 *find(const struct kvm_cpuid_entry2 *entries, unsigned n,
                                           uint32_t leaf, uint32_t subleaf) {
  for (unsigned i = 0; i < n; i++) {
    const struct kvm_cpuid_entry2 *e = &entries[i];
    if (e->function == leaf &&
        (!(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e->index == subleaf))
      return e;
  }
  return NULL;
}

uint32_t mv_cpuid_xsave_size(const struct kvm_cpuid_entry2 *entries, unsigned n, uint64_t xcr0) {
  uint32_t size = 576;
  for (unsigned i = 2; i < 8; i++) {
    const struct kvm_cpuid_entry2 *e = xcr0 >> i & 1 ? find(entries, n, 0xd, i) : NULL;
    if (e && e->ebx + e->eax > size)
      size = e->ebx + e->eax;
  }
  return size;
}

static uint32_t compacted_size(const struct kvm_cpuid_entry2 *entries, unsigned n, uint64_t xcr0) {
  uint32_t size = 576;
  for (unsigned i = 2; i < 8; i++) {
    const struct kvm_cpuid_entry2 *e = xcr0 >> i & 1 ? find(entries, n, 0xd, i) : NULL;
    size += e ? e->eax : 0;
  }
  return size;
}

void mv_cpuid_query(const struct kvm_cpuid_entry2 *entries, unsigned n, uint32_t leaf,
                    uint32_t subleaf, const struct mv_cpuid_dynamic *dynamic, uint32_t regs[4]) {
  const struct kvm_cpuid_entry2 *e = find(entries, n, leaf, subleaf);
  regs[EAX] = e ? e->eax : 0;
  regs[EBX] = e ? e->ebx : 0;
  regs[ECX] = e ? e->ecx : 0;
  regs[EDX] = e ? e->edx : 0;
  if (!e || !dynamic)
    return;
  if (leaf == 0x1) {
    if (dynamic->cr4 & BIT(18))
      regs[ECX] |= BIT(27); /* OSXSAVE                                          */
    if (!(dynamic->apic_base & BIT(11)))
      regs[EDX] &= ~BIT(9); /* APIC off                                         */
  } else if (leaf == 0xd && subleaf == 0) {
    regs[EBX] = mv_cpuid_xsave_size(entries, n, dynamic->xcr0);
  } else if (leaf == 0xd && subleaf == 1) {
    regs[EBX] = compacted_size(entries, n, dynamic->xcr0);
  }
}

bool mv_cpuid_has(const struct kvm_cpuid_entry2 *entries, unsigned n, enum mv_feature feature) {
  if (feature == MV_FEAT_BASE)
    return true;
  const struct mv_feature_bit *bit = &mv_feature_bits[feature];
  const struct kvm_cpuid_entry2 *e = find(entries, n, bit->leaf, bit->subleaf);
  if (!e)
    return false;
  const uint32_t *regs = &e->eax;
  return regs[bit->reg] >> bit->bit & 1;
}

uint64_t mv_cpuid_xcr0(const struct kvm_cpuid_entry2 *entries, unsigned n) {
  const struct kvm_cpuid_entry2 *e = find(entries, n, 0xd, 0);
  return e ? e->eax | (uint64_t)e->edx << 32 : 1;
}

/* What the translator offers. The decoder asks for every instruction, so the
 * answers are looked up once. They do not depend on the number of vCPUs. */
static bool offered[MV_FEAT_COUNT];
static _Atomic int offered_state; /* 0 unknown, 1 being looked up, 2 known      */

static void look_up_offered(void) {
  int none = 0;
  if (atomic_compare_exchange_strong(&offered_state, &none, 1)) {
    struct kvm_cpuid_entry2 entries[MV_CPUID_ENTRIES_MAX];
    unsigned n = mv_cpuid_build(entries, MV_CPUID_ENTRIES_MAX, MV_CPUID_DBT, 1, 0, NULL);
    for (unsigned i = 0; i < MV_FEAT_COUNT; i++)
      offered[i] = mv_cpuid_has(entries, n, i);
    atomic_store_explicit(&offered_state, 2, memory_order_release);
  }
  while (atomic_load_explicit(&offered_state, memory_order_acquire) != 2)
    __builtin_ia32_pause();
}

bool mv_feature_offered(enum mv_feature feature) {
  if (__builtin_expect(atomic_load_explicit(&offered_state, memory_order_acquire) != 2, false))
    look_up_offered();
  return offered[feature];
}
