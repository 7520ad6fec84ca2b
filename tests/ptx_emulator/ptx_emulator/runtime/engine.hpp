// PTX emulator engine: shared declarations.
//
// The engine is a vector interpreter.  Every PTX instruction is lowered (in Python) to one
// `Insn` whose handler works on 32-lane register arrays; a warp executes one instruction for all
// lanes of its current convergence group at a time.  Handlers are found by name, see `Registrar`.
#pragma once
#include <immintrin.h>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <limits>
#include <type_traits>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <list>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptxe {
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;
typedef double f64;

constexpr u32 FULL = ~0u;
#define PTXE_LIKELY(x) __builtin_expect(!!(x), 1)
#define PTXE_UNLIKELY(x) __builtin_expect(!!(x), 0)

// Generic-address windows (non-canonical host addresses; low 32 bits are the window offset).
constexpr u64 WIN_SHARED = 0x5A00ull << 48;  // bits 32..47: CTA rank in the cluster + 1 (0: own)
constexpr u64 WIN_LOCAL = 0x5B00ull << 48;
constexpr u64 WIN_FUNC = 0x5D00ull << 48;

struct Warp;
struct Insn;
typedef void (*Handler)(Warp&, const Insn&, u32);

enum Kind : u32 {
  K_NORMAL = 0,
  K_BRA = 1,
  K_BRX = 2,
  K_CALL = 3,
  K_CALLR = 4,
  K_RET = 5,
  K_EXIT = 6,
  K_TRAP = 7,
  K_BAR = 8,      // CTA barriers
  K_WSYNC = 9,    // warp-synchronous, member mask operand
  K_ALIGNED = 10, // warp-synchronous, all live lanes must be converged
  K_WARPBAR = 11, // bar.warp.sync
  K_POLL = 12,    // may block and be retried (mbarrier waits, cluster waits)
  K_ASSERT = 13,
};

struct Insn {
  Handler fn;
  const u32* o;  // operand offsets into the register file, and raw numbers
  s64 imm;
  u32 kind;
  u32 gp;    // guard predicate offset
  u32 csr;   // MXCSR wanted
  u32 line;
  u8 guard;  // 0 none, 1 @p, 2 @!p
  u8 leader;
  u8 chk;    // has register lists
  u8 pad;
  u32 no;
  s32 m[8];  // modifiers
  u32 idx;
  u32 src0, nsrc, dst0, ndst;  // register lists for the optional register checks
};

struct SimError : std::runtime_error {
  int lane;
  u64 addr;
  std::string what_kind;
  SimError(const std::string& kind, const std::string& m, int l = -1, u64 a = 0)
      : std::runtime_error(m), lane(l), addr(a), what_kind(kind) {}
};
std::string fmt(const char* f, ...) __attribute__((format(printf, 1, 2)));

struct Range {
  u64 lo, hi;
  u32 ro;
  u32 pad;
  u64 bit0;  // first bit of this range in the sector bitmaps
};

struct FuncInfo {
  u32 entry;
  u32 nformals, nrets;
  u32 formal0;  // index in func_slots: (offset,size) pairs, first formals then returns
};

enum Spec {
  S_TID_X, S_TID_Y, S_TID_Z, S_NTID_X, S_NTID_Y, S_NTID_Z, S_CTAID_X, S_CTAID_Y, S_CTAID_Z,
  S_NCTAID_X, S_NCTAID_Y, S_NCTAID_Z, S_LANEID, S_WARPID, S_NWARPID, S_SMID, S_NSMID, S_GRIDID,
  S_LM_EQ, S_LM_LT, S_LM_LE, S_LM_GT, S_LM_GE, S_CLUSTERID_X, S_CLUSTERID_Y, S_CLUSTERID_Z,
  S_NCLUSTERID_X, S_NCLUSTERID_Y, S_NCLUSTERID_Z, S_CLUSTER_CTAID_X, S_CLUSTER_CTAID_Y,
  S_CLUSTER_CTAID_Z, S_CLUSTER_NCTAID_X, S_CLUSTER_NCTAID_Y, S_CLUSTER_NCTAID_Z,
  S_CLUSTER_CTARANK, S_CLUSTER_NCTARANK, S_DYN_SMEM, S_TOTAL_SMEM, S_IS_EXPLICIT_CLUSTER, S_COUNT
};

// Per-instruction counters (one set per worker, summed at the end).
struct Stat {
  u64 n, lanes;                             // issues, active lanes
  u64 req, bytes, sectors, wave, ideal;     // memory
  u64 lbytes;
};

struct LaunchArgs {
  u32 grid[3], block[3], cluster[3];
  u32 shared_bytes, static_shared, dyn_shared;
  u8* params;
  u64 params_size;
  u32 nranges;
  const Range* ranges;
  u64 nbits;      // sectors over all ranges
  u8* ld_bits;    // bitmaps, nbits bits each
  u8* st_bits;
  Stat* stats;    // [ninsn]
  u64* summary;   // see core.cpp
  char* errbuf;
  u32 errlen;
  char* outbuf;   // printf output
  u32 outlen;
  u32 nthreads;
  u32 seed;
  u32 quantum;
  u32 check_race, check_uninit_shared, check_uninit_reg, check_wgmma_regs, cooperative;
  u32 check_proxy;
  u64 max_steps;
  u32 smem_fill;
  u32 nsm;
  u32 dependent;       // launched while the kernels before may still run
  u32 nearlier;
  const u64* earlier;  // what those write: first byte and end of each range, ascending
};

struct Program {
  std::vector<Insn> code;
  std::vector<u32> pool;
  std::vector<u32> reglist;
  struct Const { u32 off, size; u64 lo; };
  std::vector<Const> consts;
  u32 spec[S_COUNT];
  u32 rf_bytes;
  u32 local_bytes;
  u32 gran_shift;
  u32 nregs;
  std::vector<FuncInfo> funcs;
  std::vector<u32> func_slots;
  std::vector<std::vector<u32>> brx;
  std::string name;
};

constexpr u32 AG_PENDING = 127;   // actor number of a copy still in flight
constexpr u32 W_ATOMIC = 1u << 31;
constexpr u32 CLK_MASK = 0xffffff;
constexpr u32 MAX_ACTORS = 126;
static inline u32 wpack(u32 actor, u32 clk) { return (actor << 24) | clk; }

struct VClock {
  u32 c[128];  // what is known of every actor
  u32 f[128];  // and how far a fence between generic and asynchronous accesses lies on the way from there
  void join(const VClock& o) {
    for (int i = 0; i < 128; i++) c[i] = c[i] > o.c[i] ? c[i] : o.c[i];
    for (int i = 0; i < 128; i++) f[i] = f[i] > o.f[i] ? f[i] : o.f[i];
  }
  void fill(u32 v) { for (auto& x : c) x = v; for (auto& x : f) x = v; }
};

struct NamedBar {
  u32 arrived = 0;   // threads
  u32 expected = 0;  // 0: all threads of the CTA
  u32 red_pop = 0;
  bool red_and = true, red_or = false;
  VClock vc;
  bool vc_valid = false;
};

struct MBar {
  u32 expected, pending;
  s64 tx;
  u64 phase;
  VClock acc, done;
  u32 actor, clk;
  u32 init_actor, init_clk, init_line;
  u32 cpasync_extra;
};

struct Cluster;
struct Group;
struct Worker;

struct Cta {
  Cluster* cl;
  u32 rank;        // in cluster
  u32 id[3];
  u64 linear;
  u8* smem;
  u32 smem_bytes;
  std::vector<u32> W, Wpc, R, Rpc;  // shadow: last write, its pc; read clocks [warp][granule]; last reader pc
  u32 ngran;
  NamedBar bars[16];
  std::unordered_map<u32, MBar> mbars;
  std::vector<Warp*> warps;
  u32 live_warps;
  bool waited;  // any of its threads has executed griddepcontrol.wait
  u64 insns;
};

struct AsyncCp {  // one cp.async warp-instruction
  u32 mask, dst[32], size, srcsz[32], group, pc;
  u64 src[32];
};

struct BulkOp {  // an in-flight bulk copy
  int kind;      // 0 G2S with mbarrier, 1 S2G, 2 S2S (DSMEM), 3 reduce S2G
  Cta* dst_cta;
  u32 dst_off;
  Cta* src_cta;
  u32 src_off;
  std::vector<std::pair<u64, u32>> pieces;  // (global address or 0 = fill, bytes) in shared order
  std::vector<u32> soff;                    // shared offset of each piece
  u32 bytes;
  u32 fill;
  Cta* mb_cta;
  u32 mb_off;
  Warp* w;
  int lane;
  u32 group;
  u32 pc;
  int redop, redtype;
  bool done = false;
};

struct Warp {
  u8* rf;
  const Program* prog;
  Worker* wk;
  Cta* cta;
  u32 wid;        // in CTA
  u32 actor;      // in cluster
  u32 pc, active, live;
  u32 lpc[32];
  u32 blk, barw, poll;   // lanes waiting: warp sync, CTA barrier, polled condition
  u32 wbar;              // lanes waiting in bar.warp.sync (subset of blk)
  u32 wbarmask[32];
  bool div;
  u32 divcount;
  bool blocked, done;
  u8 ctl;         // set by K_POLL handlers: 1 = retry later
  u8 timeout;     // a blocked try_wait may return false
  u32 cc;         // carry flag, one bit per lane
  u32 barid[32], barline[32];
  VClock vc;
  u32 waited;  // lanes that have executed griddepcontrol.wait
  u8* local;
  std::vector<u32> rstack[32];  // return stack: pc of the call
  std::vector<u32> fbusy;
  // cp.async
  std::vector<AsyncCp> cpa;
  u32 cpgroup[32];
  // bulk groups
  u32 bulkgroup[32];
  // wgmma
  struct PendRead { Cta* c; u32 off, len, group; };
  std::vector<PendRead> wg_reads;
  u32 wg_group;
  struct WgReg { u32 reg, group; bool result; };  // result: written by the product; else only read, as its left operand
  std::vector<WgReg> wg_regs;
  std::vector<std::pair<u32, u32>> wg_new;    // not yet committed
  std::vector<u32> reginit;      // per register init mask (optional check)
  u32 clphase;
  u32 clarrived;
  u64 nbar, ninsn;
  template <class T> inline T* R(u32 off) const { return (T*)__builtin_assume_aligned(rf + off, 32); }
  inline u32& P(u32 off) const { return *(u32*)(rf + off); }
};

struct Cluster {
  Group* g;
  std::vector<Cta*> ctas;
  u32 nactors;      // warps, then mbarriers
  u32 nwarps;
  u32 barrier_arrived = 0, barrier_phase = 0;
  VClock barrier_vc;
  VClock barrier_done;
  std::unordered_map<u64, VClock> sync;   // address clocks for atomics and flags
};

struct Group {
  std::vector<Cluster*> clusters;
  std::vector<Warp*> warps;
  std::list<BulkOp*> bulk;
  u64 events = 0;   // anything that can unblock a polled warp
};

struct Worker {
  const Program* prog;
  LaunchArgs* L;
  Group* g = nullptr;
  u32 csr;
  std::vector<Stat> stats;
  std::vector<u32> rcache;
  std::vector<u8> ldb, stb;
  u32 clk_base = 1;
  std::mt19937 rng;
  u64 steps = 0, group_steps = 0;
  u64 summary[64] = {0};
  std::string out;
  u64 timer = 0;
};

enum Summary {
  SM_CTAS, SM_WARPS, SM_STEPS, SM_MAX_CTA_INSNS, SM_MIN_CTA_INSNS, SM_BARS, SM_MAX_WARP_BARS,
  SM_MAX_PENDING_CPASYNC, SM_SMEM_HIGH, SM_DIVERGENT_BRANCHES, SM_BRANCHES, SM_TRYWAIT_TIMEOUTS,
  SM_MAX_WARP_INSNS, SM_MBAR_WAITS, SM_BULK_BYTES, SM_REDUNDANT_WRITES
};

// ---- handler registry -------------------------------------------------------------------------
std::map<std::string, Handler>& registry();
struct Registrar {
  Registrar(const char* name, Handler h) { registry()[name] = h; }
};
#define PTXE_CAT_(a, b) a##b
#define PTXE_CAT(a, b) PTXE_CAT_(a, b)
#define REG(name, ...) static Registrar PTXE_CAT(reg_, __COUNTER__)(name, __VA_ARGS__)

// ---- small utilities ------------------------------------------------------------------------------------
constexpr u32 CSR_DEFAULT = 0x1F80;
static inline void csr(Warp& w, u32 want) {
  if (PTXE_UNLIKELY(w.wk->csr != want)) {
    _mm_setcsr(want);
    w.wk->csr = want;
  }
}
#define LANES for (int i = 0; i < 32; i++)
#define VLANES _Pragma("GCC ivdep") for (int i = 0; i < 32; i++)
#define EACH(m) \
  for (int _b = (int)(m), i = 0; _b && (i = __builtin_ctz((u32)_b), true); _b = (int)((u32)_b & ((u32)_b - 1)))

template <class T> static inline void put(T* __restrict d, const T* __restrict t, u32 m) {
  if (PTXE_LIKELY(m == FULL)) {
    memcpy(d, t, 32 * sizeof(T));
  } else {
    EACH(m) d[i] = t[i];
  }
}
static inline u32 packmask(const u32* t) {  // t[i] is 0 or ~0
  u32 r = 0;
  for (int k = 0; k < 4; k++)
    r |= (u32)(u8)_mm256_movemask_ps(_mm256_loadu_ps((const float*)(t + 8 * k))) << (8 * k);
  return r;
}
static inline void putp(Warp& w, u32 off, u32 v, u32 m) {
  u32& p = w.P(off);
  p = (p & ~m) | (v & m);
}
template <class T> static inline T bitcast(const auto& x) {
  T r;
  static_assert(sizeof(T) == sizeof(x));
  memcpy(&r, &x, sizeof(T));
  return r;
}

// float formats
static inline float h2f(u16 h) { return _cvtsh_ss(h); }
static inline float b2f(u16 b) { return bitcast<float>((u32)b << 16); }
static inline u16 f2h(float f) { return _cvtss_sh(f, 0); }
static inline u16 f2b(float f) {
  u32 u = bitcast<u32>(f);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
enum Rnd { RN = 0, RZ = 1, RM = 2, RP = 3, RNA = 4 };
// Round a double to a binary format with `mant` explicit mantissa bits and exponent bias `bias`;
// returns the encoding without sign handling surprises.  See fp.cpp.
u32 encode_float(double x, int ebits, int mant, int rnd, bool satfinite, bool e4m3);
double decode_float(u32 v, int ebits, int mant, bool e4m3);

// ---- memory (mem.cpp) ---------------------------------------------------------------------------
u64 global_check(Warp& w, const Insn& I, u32 m, const u64* addr, u32 size, bool store, bool count);
void check_global_bytes(Warp& w, u64 addr, u64 len, bool store, int lane);
void count_sectors_range(Warp& w, const Insn& I, u64 addr, u64 len, bool store);
void shared_bounds(Warp& w, Cta& c, u32 off, u32 len, u32 align, int lane);
void shadow_read(Warp& w, Cta& c, u32 off, u32 len, u32 pc, int lane, bool async_read = false);
void shadow_write(Warp& w, Cta& c, u32 off, u32 len, u32 pc, int lane, u32 wval, const u8* data = nullptr);
u32 bank_wavefronts(const u32* addr, u32 m, u32 size, u32* ideal);
Cta* shared_target(Warp& w, u64 generic, u32* off, int lane);
void complete_cpasync(Warp& w, u32 mask, u32 keep, bool all, int actor = -1, u32 clk = 0);
void release(Warp& w);
// barriers (sync.cpp)
void mbar_complete_tx(Cta& c, u32 off, s64 bytes, Group& g);
bool run_bulk(Group& g, Worker& wk, bool any);
void finish_bulk(Group& g, BulkOp* b);
void wake_polled(Group& g);
void warp_wait_bulk(Warp& w);
}  // namespace ptxe
