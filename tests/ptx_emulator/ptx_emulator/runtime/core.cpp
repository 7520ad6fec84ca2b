// Scheduler, control flow, barriers, mbarriers, bulk copies, C interface.
#include "engine.hpp"
#include <algorithm>
#include <mutex>
#include <thread>
namespace ptxe {
constexpr u32 NONE = ~0u;

// ---- convergence groups -----------------------------------------------------------------------------
static void pick(Warp& w) {  // choose the group to run among the runnable lanes
  u32 cand = w.live & ~(w.blk | w.barw | w.poll);
  if (!cand) {
    w.active = 0;
    if (w.live == 0) { w.done = true; return; }
    if (!(w.barw | w.poll)) {
      u32 l = __builtin_ctz(w.blk);
      std::string o;
      EACH(w.blk) { u32 ln = w.prog->code[w.lpc[i]].line; if (i == (int)l || ln != w.prog->code[w.lpc[l]].line) { o += fmt("%slane %d at line %u", o.empty() ? "" : ", ", i, ln); if (o.size() > 200) break; } }
      throw SimError("divergence", "warp-level synchronisation can never complete: lanes wait at different instructions (" + o + ")", l);
    }
    w.blocked = true;
    return;
  }
  u32 pc = FULL;
  if (PTXE_UNLIKELY(++w.divcount > 20000)) {  // forward progress for spinning divergent lanes
    int k = w.wk->rng() % __builtin_popcount(cand);
    u32 b = cand;
    while (k--) b &= b - 1;
    pc = w.lpc[__builtin_ctz(b)];
  } else EACH(cand) pc = std::min(pc, w.lpc[i]);
  u32 act = 0;
  EACH(cand | (w.blk & ~w.wbar)) if (w.lpc[i] == pc) act |= 1u << i;
  w.active = act;
  w.blk &= ~act;
  w.pc = pc;
  w.div = act != w.live;
  if (!w.div) w.divcount = 0;
}
static inline void park(Warp& w, u32 m, u32 pc) { EACH(m) w.lpc[i] = pc; }
// let the running lanes wait, in the set `waiting`, before an instruction that was counted for the lanes m and did not run
static void hold(Warp& w, Stat& s, u32 m, u32& waiting) {
  s.n--; s.lanes -= __builtin_popcount(m); w.ninsn--;
  park(w, w.active, w.pc);
  waiting |= w.active;
  w.active = 0;
  pick(w);
}

// ---- CTA barriers --------------------------------------------------------------------------------------
static u32 live_threads(Cta& c) { u32 n = 0; for (Warp* w : c.warps) if (!w->done) n += 32; return n; }
static void bar_release(Cta& c, u32 id) {
  NamedBar& b = c.bars[id];
  for (Warp* w : c.warps) {
    u32 m = 0;
    EACH(w->barw) if (w->barid[i] == id) m |= 1u << i;
    if (!m) continue;
    EACH(m) {
      const Insn& I = w->prog->code[w->lpc[i]];
      if (I.m[1] == 2) {  // bar.red
        u32 r = I.m[2] == 0 ? b.red_pop : I.m[2] == 1 ? b.red_and : b.red_or;
        if (I.m[2] == 0) w->R<u32>(I.o[0])[i] = r;
        else putp(*w, I.o[0], r ? FULL : 0, 1u << i);
      }
      w->lpc[i]++;
    }
    w->barw &= ~m;
    if (b.vc_valid) w->vc.join(b.vc);
    release(*w);
    w->blocked = false;
    if (!w->active) pick(*w);
  }
  b = NamedBar();
}
static void bar_check(Cta& c, u32 id) {
  NamedBar& b = c.bars[id];
  if (!b.arrived) return;
  u32 need = b.expected ? b.expected : live_threads(c);
  if (b.arrived > need) throw SimError("barrier", fmt("barrier %u: %u threads arrived but only %u are expected", id, b.arrived, need));
  if (b.arrived == need) bar_release(c, id);
}
// BAR: o = [dst, pred] for red; [id, count]; m0 id (-1: register o[2]); m1 0 sync 1 arrive 2 red; m2 red op;
// m3 count (0: all, -1: register o[3]); m4 aligned; m5 negate pred
static void do_bar(Warp& w, const Insn& I, u32 m) {
  int l = __builtin_ctz(m);
  u32 id = I.m[0] >= 0 ? I.m[0] : w.R<u32>(I.o[2])[l], cnt = I.m[3] >= 0 ? I.m[3] : w.R<u32>(I.o[3])[l];
  if (id > 15) throw SimError("barrier", fmt("barrier number %u is larger than 15", id), l);
  if (cnt & 31) throw SimError("barrier", fmt("barrier thread count %u is not a multiple of 32", cnt), l);
  NamedBar& b = w.cta->bars[id];
  if (b.arrived && b.expected != cnt) throw SimError("barrier", fmt("barrier %u used with thread count %u while %u is in progress", id, cnt, b.expected), l);
  b.expected = cnt;
  bool whole = (m == w.live);
  b.arrived += (I.m[4] || whole) ? 32 : __builtin_popcount(m);
  if (!b.vc_valid) { b.vc = w.vc; b.vc_valid = true; } else b.vc.join(w.vc);
  w.nbar++;
  if (I.m[1] == 2) {
    u32 p = w.P(I.o[1]) ^ (I.m[5] ? FULL : 0);
    b.red_pop += __builtin_popcount(p & m);
    if ((p & m) != m) b.red_and = false;
    if (p & m) b.red_or = true;
  }
  if (I.m[1] == 1) {  // arrive
    release(w);
    w.pc++;
    bar_check(*w.cta, id);
    return;
  }
  EACH(m) { w.barid[i] = id; w.barline[i] = I.line; }
  park(w, w.active, w.pc);
  w.barw |= m;
  if (w.active & ~m) park(w, w.active & ~m, w.pc + 1);
  w.active = 0;
  u32 others = w.live & ~(w.barw | w.blk | w.poll);
  if (others) pick(w); else w.blocked = true;
  bar_check(*w.cta, id);
}
static void hBarStub(Warp&, const Insn&, u32) {}
REG("bar", hBarStub);
REG("ctl", hBarStub);

// ---- mbarriers --------------------------------------------------------------------------------------------
void wake_polled(Group& g) {
  g.events++;
  for (Warp* w : g.warps) if (w->poll) { w->poll = 0; if (!w->active) { w->blocked = false; pick(*w); } }
}
static MBar& mbar(Warp& w, Cta& c, u32 off, int lane) {
  auto it = c.mbars.find(off);
  if (it == c.mbars.end()) throw SimError("mbarrier", fmt("mbarrier at shared offset 0x%x was not initialised", off), lane, off);
  MBar& b = it->second;
  if (w.wk->L->check_race && b.init_actor != w.actor && w.vc.c[b.init_actor] < b.init_clk)
    throw SimError("race", fmt("mbarrier at shared offset 0x%x is used without a barrier after its initialisation at PTX line %u", off, b.init_line), lane, off);
  return b;
}
static void mbar_check(Group& g, MBar& b) {
  while (b.pending == 0 && b.tx == 0) {
    b.phase++;
    b.pending = b.expected;
    b.done.join(b.acc);
    wake_polled(g);
    if (b.expected == 0) break;
  }
}
void mbar_complete_tx(Cta& c, u32 off, s64 bytes, Group& g) {
  auto it = c.mbars.find(off);
  if (it == c.mbars.end()) throw SimError("mbarrier", fmt("complete_tx on mbarrier at 0x%x, which was not initialised", off));
  it->second.tx -= bytes;
  mbar_check(g, it->second);
}
static u64 addr1(Warp& w, u32 reg, int size, int i) { return size == 8 ? w.R<u64>(reg)[i] : w.R<u32>(reg)[i]; }
// mbarrier.init: o = [addr, count]; m0 = address size
static void hMbInit(Warp& w, const Insn& I, u32 m) {
  EACH(m) {
    u32 off = (u32)(addr1(w, I.o[0], I.m[0], i) + I.imm), n = w.R<u32>(I.o[1])[i];
    Cta& c = *w.cta;
    shared_bounds(w, c, off, 8, 8, i);
    if (n == 0 || n > 0xfffff) throw SimError("mbarrier", fmt("mbarrier.init count %u is out of range", n), i);
    shadow_write(w, c, off, 8, I.idx, i, wpack(w.actor, w.vc.c[w.actor]));
    u32 ag = w.cta->cl->nactors < MAX_ACTORS ? w.cta->cl->nactors++ : MAX_ACTORS - 1;
    auto it = c.mbars.find(off);
    if (it != c.mbars.end()) ag = it->second.actor, w.cta->cl->nactors--;
    MBar b;
    memset(&b, 0, sizeof b);
    b.expected = b.pending = n;
    b.actor = ag;
    b.clk = it != c.mbars.end() ? it->second.clk : w.wk->clk_base + 1;
    b.init_actor = w.actor; b.init_clk = w.vc.c[w.actor]; b.init_line = I.line;
    c.mbars[off] = b;
    u64 v = 0x8000000000000000ull | n;
    memcpy(c.smem + off, &v, 8);
  }
}
REG("mbarrier.init", hMbInit);
static void hMbInval(Warp& w, const Insn& I, u32 m) {
  EACH(m) { u32 off = (u32)(addr1(w, I.o[0], I.m[0], i) + I.imm); mbar(w, *w.cta, off, i); w.cta->mbars.erase(off); }
}
REG("mbarrier.inval", hMbInval);
// arrive: o = [state or NONE, addr, count or NONE]; m0 addr size, m1 flags: 1 expect_tx (count = tx), 2 no arrive (expect_tx
// only), 4 complete_tx, 8 arrive_drop, 16 noComplete; m2: o[2] given
static void hMbArrive(Warp& w, const Insn& I, u32 m) {
  EACH(m) {
    u32 off;
    Cta* c = shared_target(w, addr1(w, I.o[1], I.m[0], i) + I.imm, &off, i);
    MBar& b = mbar(w, *c, off, i);
    u32 cnt = I.o[2] != NONE ? w.R<u32>(I.o[2])[i] : 1;
    if (I.o[0] != NONE) w.R<u64>(I.o[0])[i] = b.phase << 20;
    if (I.m[1] & 4) { b.tx -= cnt; mbar_check(*w.cta->cl->g, b); continue; }
    if (I.m[1] & 1) b.tx += cnt;
    if (I.m[1] & 2) continue;
    u32 n = I.m[1] & 1 ? 1 : cnt;
    if (b.pending < n) throw SimError("mbarrier", fmt("mbarrier at 0x%x: more arrivals than the expected count %u in one phase", off, b.expected), i, off);
    b.acc.join(w.vc);
    if (I.m[1] & 8) b.expected -= n;
    b.pending -= n;
    release(w);
    mbar_check(*w.cta->cl->g, b);
  }
}
REG("mbarrier.arrive", hMbArrive);
// wait: o = [pred, addr, state/parity]; m0 addr size; m1 parity form; m2 try (may block)
static void hMbWait(Warp& w, const Insn& I, u32 m) {
  u32 ok = 0;
  EACH(m) {
    u32 off;
    Cta* c = shared_target(w, addr1(w, I.o[1], I.m[0], i) + I.imm, &off, i);
    MBar& b = mbar(w, *c, off, i);
    bool d = I.m[1] ? ((b.phase & 1) != (w.R<u32>(I.o[2])[i] & 1)) : (b.phase > w.R<u64>(I.o[2])[i] >> 20);
    if (d) { ok |= 1u << i; w.vc.join(b.done); }
  }
  if (ok != m && I.m[2] && !w.timeout) { w.ctl = 1; return; }
  if (w.timeout) { w.timeout = 0; w.wk->summary[SM_TRYWAIT_TIMEOUTS]++; }
  w.wk->summary[SM_MBAR_WAITS]++;
  putp(w, I.o[0], ok, m);
}
REG("mbarrier.wait", hMbWait);
static void hMbPending(Warp& w, const Insn& I, u32 m) { EACH(m) w.R<u32>(I.o[0])[i] = (u32)(w.R<u64>(I.o[1])[i] & 0xfffff); }
REG("mbarrier.pending_count", hMbPending);
// cp.async.mbarrier.arrive: o = [addr]; m0 addr size; m1 noinc
static void hCpMbArrive(Warp& w, const Insn& I, u32 m) {
  EACH(m) {
    u32 off = (u32)(addr1(w, I.o[0], I.m[0], i) + I.imm);
    MBar& b = mbar(w, *w.cta, off, i);
    b.clk++;
    complete_cpasync(w, 1u << i, 0, true, b.actor, b.clk);
    b.acc.c[b.actor] = b.clk;
    if (I.m[1]) { if (!b.pending) throw SimError("mbarrier", "too many arrivals", i, off); b.pending--; mbar_check(*w.cta->cl->g, b); }
  }
}
REG("cp.async.mbarrier", hCpMbArrive);
static void hProxyFence(Warp& w, const Insn&, u32) {
  for (int i = 0; i < 128; i++) w.vc.f[i] = std::max(w.vc.f[i], w.vc.c[i]);
  release(w);  // later writes are not behind this fence
}
REG("fence.proxy", hProxyFence);
static void hGridWait(Warp& w, const Insn&, u32 m) { w.waited |= m; w.cta->waited = true; }
REG("griddepcontrol.wait", hGridWait);

// ---- cluster barrier ----------------------------------------------------------------------------------------
static void hClArrive(Warp& w, const Insn&, u32 m) {
  Cluster& c = *w.cta->cl;
  c.barrier_arrived += m == w.live ? 32 : __builtin_popcount(m);
  c.barrier_vc.join(w.vc);
  release(w);
  w.clphase = c.barrier_phase;
  if (c.barrier_arrived >= c.nwarps * 32) { c.barrier_arrived = 0; c.barrier_phase++; c.barrier_done = c.barrier_vc; wake_polled(*c.g); }
}
static void hClWait(Warp& w, const Insn&, u32) {
  Cluster& c = *w.cta->cl;
  if (c.barrier_phase == w.clphase) { w.ctl = 1; return; }
  w.vc.join(c.barrier_done);
}
REG("cluster.arrive", hClArrive);
REG("cluster.wait", hClWait);

// ---- bulk copies ----------------------------------------------------------------------------------------------
// Software tensor map, 128 bytes.
struct TMap {
  u64 base;
  u64 stride[4];   // bytes, dimensions 1..4
  u32 dim[5];
  u32 box[5];
  u8 estride[5];
  u8 rank_m1, elemtype, interleave, swizzle, fill, pad[2];
};
static_assert(sizeof(TMap) <= 128, "tensor map");
// element types are numbered as in the driver's CUtensorMapDataType
static const int tm_esize[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
static void wr_shadow(Cta& c, u32 off, u32 len, u32 v, u32 pc, u32 sh) {
  if (!c.ngran) return;
  for (u32 g = off >> sh; g <= (off + len - 1) >> sh; g++) { c.W[g] = v; c.Wpc[g] = pc; }
}
static void smem_written(Warp& w, Cta& c, u32 off, u32 len, u32 pc, MBar* b, int lane) {
  shadow_write(w, c, off, len, pc, lane, b ? wpack(b->actor, b->clk) : wpack(w.actor, w.vc.c[w.actor]));
}
static u8* mapped(Warp& w, u64 a, u32 n, int lane) {
  if (a >> 48 == WIN_SHARED >> 48) { shared_bounds(w, *w.cta, (u32)a, n, 1, lane); return w.cta->smem + (u32)a; }
  return (u8*)a;
}
static void async_read_mark(Warp& w, Cta& c, u32 off, u32 len, int lane, u32 pc) {
  shadow_read(w, c, off, len, pc, lane, true);
  if (w.wk->L->check_race) {
    u32 sh = w.prog->gran_shift;
    u32* R = c.R.data() + (size_t)w.actor * c.ngran;
    for (u32 g = off >> sh; g <= (off + len - 1) >> sh; g++) R[g] = FULL;
    w.wg_reads.push_back({&c, off, len, 0x80000000u | w.bulkgroup[lane]});
  }
}
static void reduce_bytes(u8* d, const u8* s, u32 n, int op, int ty) {  // op 0 add 1 min 2 max 3 inc 4 dec 5 and 6 or 7 xor; ty TMap elemtype
  u32 es = tm_esize[ty];
  for (u32 k = 0; k < n; k += es) {
    static std::mutex mu;
    std::lock_guard<std::mutex> g(mu);
    auto go = [&](auto v) {
      typedef decltype(v) T;
      T a, b;
      memcpy(&a, d + k, sizeof(T)); memcpy(&b, s + k, sizeof(T));
      T r = op == 0 ? a + b : op == 1 ? std::min(a, b) : std::max(a, b);
      memcpy(d + k, &r, sizeof(T));
    };
    switch (ty) {
      case 2: go(u32()); break;
      case 3: go(s32()); break;
      case 4: go(u64()); break;
      case 5: go(s64()); break;
      case 7: case 10: go(f32()); break;
      case 8: go(f64()); break;
      case 6: case 9: { u16 a, b; memcpy(&a, d + k, 2); memcpy(&b, s + k, 2); float x = ty == 9 ? b2f(a) : h2f(a), y = ty == 9 ? b2f(b) : h2f(b);
        float r = op == 0 ? x + y : op == 1 ? std::fmin(x, y) : std::fmax(x, y); u16 o = ty == 9 ? f2b(r) : f2h(r); memcpy(d + k, &o, 2); break; }
      default: throw SimError("unsupported", "bulk reduction of this type");
    }
  }
}
// linear: o = [dst, src, size, mbar or NONE, ctaMask or NONE]; m0 direction 0 G2S 1 S2G 2 S2S; m1 dst addr size m2 src addr size
// m3 mbar addr size; m4 reduction op + 1; m5 reduction type
static void hBulk(Warp& w, const Insn& I, u32 m) {
  Stat& st = w.wk->stats[I.idx];
  EACH(m) {
    u64 d = addr1(w, I.o[0], I.m[1], i), s = addr1(w, I.o[1], I.m[2], i);
    u32 n = w.R<u32>(I.o[2])[i];
    if ((d | s | n) & 15) throw SimError("misaligned", fmt("cp.async.bulk needs 16-byte aligned addresses and size (size %u)", n), i, d);
    st.req++;
    w.wk->summary[SM_BULK_BYTES] += n;
    if (I.m[0] == 1) {
      u32 so = (u32)s;
      check_global_bytes(w, d, n, true, i);
      shared_bounds(w, *w.cta, so, n, 16, i);
      async_read_mark(w, *w.cta, so, n, i, I.idx);
      if (I.m[4]) reduce_bytes((u8*)d, w.cta->smem + so, n, I.m[4] - 1, I.m[5]);
      else memcpy((void*)d, w.cta->smem + so, n);
      count_sectors_range(w, I, d, n, true);
      continue;
    }
    u32 mask = I.o[4] != NONE ? (u32)w.R<u16>(I.o[4])[i] : 0;
    for (size_t rk = 0; rk < w.cta->cl->ctas.size(); rk++) {
      u32 doff, moff;
      Cta *dc = shared_target(w, d, &doff, i), *mc = shared_target(w, addr1(w, I.o[3], I.m[3], i), &moff, i);
      if (mask) { if (!(mask >> rk & 1)) continue; dc = mc = w.cta->cl->ctas[rk]; }
      else if (rk) break;
      MBar& b = mbar(w, *mc, moff, i);
      b.clk++;
      shared_bounds(w, *dc, doff, n, 16, i);
      const u8* src;
      if (I.m[0] == 0) { check_global_bytes(w, s, n, false, i); src = (const u8*)s; }
      else { shared_bounds(w, *w.cta, (u32)s, n, 16, i); shadow_read(w, *w.cta, (u32)s, n, I.idx, i, true); src = w.cta->smem + (u32)s; }
      smem_written(w, *dc, doff, n, I.idx, &b, i);
      memcpy(dc->smem + doff, src, n);
      b.acc.c[b.actor] = b.clk;
      b.tx -= n;
      mbar_check(*w.cta->cl->g, b);
    }
    if (I.m[0] == 0) count_sectors_range(w, I, s, n, false);
  }
}
REG("cp.async.bulk", hBulk);
// tensor: o = [smem, tensormap, mbar or NONE, ctaMask or NONE, coord0..]; m0 direction (0 G2S, 1 S2G), m1 smem addr size, m2 rank,
// m3 mbar addr size, m4 reduction op + 1; m5 tensormap is a prefetch
static void hBulkTensor(Warp& w, const Insn& I, u32 m) {
  Stat& st = w.wk->stats[I.idx];
  EACH(m) {
    TMap t;
    u64 ta = w.R<u64>(I.o[1])[i];
    check_global_bytes(w, ta, 128, false, i);
    memcpy(&t, (void*)ta, sizeof t);
    int rank = I.m[2], es = tm_esize[t.elemtype];
    if (t.rank_m1 + 1 != rank) throw SimError("tensormap", fmt("instruction has %d dimensions, the tensor map %d", rank, t.rank_m1 + 1), i);
    u32 tot = 1;
    for (int k = 0; k < rank; k++) tot *= (t.box[k] + std::max<u32>(t.estride[k], 1) - 1) / std::max<u32>(t.estride[k], 1);
    u32 rowe = (t.box[0] + std::max<u32>(t.estride[0], 1) - 1) / std::max<u32>(t.estride[0], 1), rowb = rowe * es, bytes = tot * es;
    if (t.swizzle && rowb > (16u << t.swizzle)) throw SimError("tensormap", "inner box dimension is larger than the swizzle span", i);
    if (rowb & 15) throw SimError("tensormap", fmt("inner box dimension of %u bytes is not a multiple of 16", rowb), i);
    s32 co[5];
    for (int k = 0; k < rank; k++) co[k] = w.R<s32>(I.o[4 + k])[i];
    u64 sa = addr1(w, I.o[0], I.m[1], i);
    u32 soff;
    Cta* sc = shared_target(w, sa, &soff, i);
    if (soff & 127) throw SimError("misaligned", fmt("tensor copy needs 128-byte aligned shared memory, offset 0x%x", soff), i, soff);
    st.req++;
    w.wk->summary[SM_BULK_BYTES] += bytes;
    u32 mask = I.o[3] != NONE ? (u32)w.R<u16>(I.o[3])[i] : 0;
    for (size_t rk = 0; rk < w.cta->cl->ctas.size(); rk++) {
      MBar* b = nullptr;
      if (mask) { if (!(mask >> rk & 1)) continue; sc = w.cta->cl->ctas[rk]; } else if (rk) break;
      if (I.m[0] == 0) {
        u32 moff;
        Cta* mc = shared_target(w, addr1(w, I.o[2], I.m[3], i), &moff, i);
        if (mask) mc = sc;
        b = &mbar(w, *mc, moff, i);
        b->clk++;
      }
      shared_bounds(w, *sc, soff, bytes, 128, i);
      if (b) smem_written(w, *sc, soff, bytes, I.idx, b, i); else async_read_mark(w, *sc, soff, bytes, i, I.idx);
      for (u32 r = 0; r < tot / rowe; r++) {
        u32 q = r;
        bool in = true;
        u64 ga = t.base;
        for (int k = 1; k < rank; k++) {
          u32 es_k = std::max<u32>(t.estride[k], 1), n = (t.box[k] + es_k - 1) / es_k;
          s64 x = (s64)co[k] + (s64)(q % n) * es_k;
          q /= n;
          if (x < 0 || x >= t.dim[k]) in = false;
          ga += x * t.stride[k - 1];
        }
        s64 lo = -1, hi = -1;
        for (u32 e = 0; e < rowe; e++) {
          s64 x = (s64)co[0] + (s64)e * std::max<u32>(t.estride[0], 1);
          u32 so = soff + r * rowb + e * es;
          if (t.swizzle) so = t.swizzle == 3 ? so ^ ((so >> 3) & 0x70) : t.swizzle == 2 ? so ^ ((so >> 3) & 0x30) : so ^ ((so >> 3) & 0x10);
          bool ok = in && x >= 0 && x < t.dim[0];
          if (ok) {
            u64 a = ga + x * es;
            if (lo < 0) { lo = a; check_global_bytes(w, a, es, I.m[0] == 1, i); }
            hi = a + es;
            if (b) memcpy(sc->smem + so, (void*)a, es);
            else if (I.m[4]) reduce_bytes((u8*)a, sc->smem + so, es, I.m[4] - 1, t.elemtype);
            else memcpy((void*)a, sc->smem + so, es);
          } else if (b) {
            memset(sc->smem + so, 0, es);
            if (t.fill) { if (es == 2) { u16 v = 0x7fff; memcpy(sc->smem + so, &v, 2); } else if (es == 4) { u32 v = 0x7fffffff; memcpy(sc->smem + so, &v, 4); } }
          }
        }
        if (lo >= 0) { check_global_bytes(w, hi - es, es, I.m[0] == 1, i); if (!rk || mask) count_sectors_range(w, I, lo, hi - lo, I.m[0] == 1); }
      }
      if (b) { b->acc.c[b->actor] = b->clk; b->tx -= bytes; mbar_check(*w.cta->cl->g, *b); }
    }
  }
}
REG("cp.async.bulk.tensor", hBulkTensor);
static void hBulkCommit(Warp& w, const Insn&, u32 m) { EACH(m) w.bulkgroup[i]++; }
REG("cp.async.bulk.commit", hBulkCommit);
static void hBulkWait(Warp& w, const Insn& I, u32 m) {
  size_t k = 0;
  for (auto& p : w.wg_reads) {
    if ((p.group & 0x80000000u) && (p.group & 0x7fffffff) + I.m[0] < w.bulkgroup[__builtin_ctz(m)]) {
      u32 sh = w.prog->gran_shift;
      u32* R = p.c->R.data() + (size_t)w.actor * p.c->ngran;
      for (u32 g = p.off >> sh; g <= (p.off + p.len - 1) >> sh; g++) R[g] = w.vc.c[w.actor];
    } else w.wg_reads[k++] = p;
  }
  w.wg_reads.resize(k);
}
REG("cp.async.bulk.wait", hBulkWait);
// tensormap.replace: o = [addr, value]; m0 field; m1 ordinal; m2 addr size, m3 value size
static void hTmReplace(Warp& w, const Insn& I, u32 m) {
  EACH(m) {
    u64 a = addr1(w, I.o[0], I.m[2], i);
    if (I.m[4]) a = WIN_SHARED | (u32)a;
    TMap t;
    u8* p = mapped(w, a, 128, i);
    if (a >> 48 == WIN_SHARED >> 48) shadow_write(w, *w.cta, (u32)a, 128, I.idx, i, wpack(w.actor, w.vc.c[w.actor]));
    else check_global_bytes(w, a, 128, true, i);
    memcpy(&t, p, sizeof t);
    u64 v = I.m[3] == 8 ? w.R<u64>(I.o[1])[i] : w.R<u32>(I.o[1])[i];
    int k = I.m[1];
    switch (I.m[0]) {
      case 0: t.base = v; break;
      case 1: t.rank_m1 = v; break;
      case 2: t.box[k] = v; break;
      case 3: t.dim[k] = v; break;
      case 4: t.stride[k] = v; break;
      case 5: t.estride[k] = v; break;
      case 6: t.elemtype = v == 8 ? 10 : v == 9 ? 8 : v == 10 ? 9 : v; break;  // PTX and driver number the types differently
      case 7: t.interleave = v; break;
      case 8: t.swizzle = v; break;
      case 9: t.fill = v; break;
    }
    memcpy(p, &t, sizeof t);
  }
}
REG("tensormap.replace", hTmReplace);
static void hTmCopy(Warp& w, const Insn& I, u32 m) {  // o = [dst global, src shared, bytes]; m0, m1 sizes
  int i = __builtin_ctz(m);
  u64 d = addr1(w, I.o[0], I.m[0], i);
  u32 s = (u32)addr1(w, I.o[1], I.m[1], i);
  check_global_bytes(w, d, 128, true, i);
  shared_bounds(w, *w.cta, s, 128, 1, i);
  memcpy((void*)d, w.cta->smem + s, 128);
}
REG("tensormap.cp", hTmCopy);

// ---- running a warp ----------------------------------------------------------------------------------------------
static void reg_checks(Warp& w, const Insn& I, u32 m) {
  const u32* L = w.prog->reglist.data();
  if (w.wk->L->check_uninit_reg) {
    for (u32 k = 0; k < I.nsrc; k++) {
      u32 bad = m & ~w.reginit[L[I.src0 + k] >> 2];
      if (bad) throw SimError("uninitialised", "reads a register that was never written", __builtin_ctz(bad));
    }
    for (u32 k = 0; k < I.ndst; k++) w.reginit[L[I.dst0 + k] >> 2] |= m;
  }
  if (w.wk->L->check_wgmma_regs && w.wg_regs.size() && I.chk != 2)
    for (auto& p : w.wg_regs) {
      for (u32 k = 0; k < I.nsrc && p.result; k++) if (L[I.src0 + k] == p.reg) throw SimError("wgmma", "reads a wgmma register before wgmma.wait_group", 0);
      for (u32 k = 0; k < I.ndst; k++) if (L[I.dst0 + k] == p.reg) throw SimError("wgmma", "writes a wgmma register before wgmma.wait_group", 0);
    }
}
static void do_exit(Warp& w, u32 m) {
  w.live &= ~m;
  EACH(m) if (w.cpa.size()) { complete_cpasync(w, m, 0, true); break; }
  if (w.active & ~m) { w.active &= ~m; w.pc++; }
  else {
    w.active = 0;
    w.blk &= w.wbar;  // waits are evaluated again
    EACH(w.wbar) if ((w.wbar >> i & 1) && !(w.wbarmask[i] & w.live & ~w.wbar)) { u32 r = w.wbarmask[i] & w.wbar; w.blk &= ~r; w.wbar &= ~r; }
    w.blk &= w.live; w.wbar &= w.live;
    pick(w);
  }
}
template <bool CHECK> static void run_warp(Warp& w, s64 budget) {
  const Insn* code = w.prog->code.data();
  Stat* st = w.wk->stats.data();
  while (budget-- > 0) {
    const Insn& I = code[w.pc];
    if (PTXE_UNLIKELY(w.div && I.leader)) {
      park(w, w.active, w.pc);
      w.active = 0;
      pick(w);
      if (!w.active) return;
      if (&code[w.pc] != &I) { budget++; const Insn& J = code[w.pc]; if (J.leader) goto run; goto run; }
    }
  run: {
    const Insn& I = code[w.pc];
    u32 m = w.active;
    if (I.guard) m &= I.guard == 1 ? w.P(I.gp) : ~w.P(I.gp);
    Stat& s = st[w.pc];
    s.n++;
    s.lanes += __builtin_popcount(m);
    w.ninsn++;
    if (CHECK && m) reg_checks(w, I, m);
    if (PTXE_LIKELY(I.kind == K_NORMAL)) {
      if (m) I.fn(w, I, m);
      w.pc++;
      continue;
    }
    switch (I.kind) {
      case K_BRA: {
        w.wk->summary[SM_BRANCHES]++;
        u32 nt = w.active & ~m, t = (u32)I.imm;
        if (!m) { w.pc++; break; }
        if (!nt) { w.pc = t; break; }
        w.wk->summary[SM_DIVERGENT_BRANCHES]++;
        park(w, m, t);
        park(w, nt, w.pc + 1);
        w.active = 0;
        pick(w);
        break;
      }
      case K_BRX: {
        const auto& tab = w.prog->brx[I.m[0]];
        const u32* x = w.R<u32>(I.o[0]);
        park(w, w.active & ~m, w.pc + 1);
        EACH(m) { if (x[i] >= tab.size()) throw SimError("control", fmt("brx.idx index %u is outside the table", x[i]), i); w.lpc[i] = tab[x[i]]; }
        w.active = 0;
        pick(w);
        break;
      }
      case K_CALL: case K_CALLR: {
        if (!m) { w.pc++; break; }
        u32 f = (u32)I.imm;
        if (I.kind == K_CALLR) {
          u64 a = w.R<u64>(I.o[0])[__builtin_ctz(m)];
          if (a >> 48 != WIN_FUNC >> 48 || (u32)a >= w.prog->funcs.size()) throw SimError("control", "indirect call to something that is not a function", __builtin_ctz(m), a);
          f = (u32)a;
          u32 same = 0;
          EACH(m) if (w.R<u64>(I.o[0])[i] == a) same |= 1u << i;
          if (same != w.active) { park(w, w.active & ~m, w.pc + 1); park(w, m & ~same, w.pc); w.div = true; }
          m = same;
        } else if (m != w.active) { park(w, w.active & ~m, w.pc + 1); w.div = true; }
        const FuncInfo& F = w.prog->funcs[f];
        if (w.fbusy[f] & m) throw SimError("unsupported", "recursive device function calls are not supported", __builtin_ctz(m));
        w.fbusy[f] |= m;
        u32 lb = w.prog->local_bytes, base = I.kind == K_CALLR ? 1 : 0;
        u32 na = I.m[0];
        if (na != F.nformals) throw SimError("control", "call with a different number of arguments than the function has");
        EACH(m) {
          for (u32 k = 0; k < na; k++) { const u32* sl = &w.prog->func_slots[F.formal0 + 2 * k]; memmove(w.local + (size_t)i * lb + sl[0], w.local + (size_t)i * lb + I.o[base + k], sl[1]); }
          w.rstack[i].push_back(w.pc);
        }
        w.active = m;
        w.pc = F.entry;
        break;
      }
      case K_RET: {
        if (!m) { w.pc++; break; }
        u32 lb = w.prog->local_bytes;
        EACH(m) {
          if (w.rstack[i].empty()) throw SimError("control", "ret without a call", i);
          u32 cp = w.rstack[i].back();
          w.rstack[i].pop_back();
          const Insn& C = code[cp];
          const FuncInfo& F = w.prog->funcs[I.m[0]];
          w.fbusy[I.m[0]] &= ~(1u << i);
          u32 base = (C.kind == K_CALLR ? 1 : 0) + C.m[0];
          for (s32 k = 0; k < C.m[1]; k++) { const u32* sl = &w.prog->func_slots[F.formal0 + 2 * (F.nformals + k)]; memmove(w.local + (size_t)i * lb + C.o[base + k], w.local + (size_t)i * lb + sl[0], sl[1]); }
          w.lpc[i] = cp + 1;
        }
        park(w, w.active & ~m, w.pc + 1);
        w.active = 0;
        pick(w);
        break;
      }
      case K_EXIT:
        if (!m) { w.pc++; break; }
        do_exit(w, m);
        break;
      case K_TRAP:
        if (!m) { w.pc++; break; }
        throw SimError("trap", "trap executed", __builtin_ctz(m));
      case K_BAR: {
        if (!m) { w.pc++; break; }
        if (I.m[4] && w.active != w.live) {  // aligned: wait for the other lanes of the warp first
          u32 others = w.live & ~w.active;
          if ((others & ~(w.blk | w.barw | w.poll)) == 0 && (others & ~w.poll)) {
            int l = __builtin_ctz(others & ~w.poll);
            throw SimError("barrier", fmt("divergent bar.sync: lanes 0x%08x of the warp are here while lane %d waits at PTX line %u", w.active, l, code[w.lpc[l]].line), __builtin_ctz(w.active));
          }
          hold(w, s, m, w.blk);
          break;
        }
        do_bar(w, I, m);
        break;
      }
      case K_ALIGNED: case K_WSYNC: {
        if (!m) { w.pc++; break; }
        u32 need = w.live;
        if (I.kind == K_WSYNC) { u32 mm = w.R<u32>(I.o[I.no - 1])[__builtin_ctz(m)]; need = mm & w.live;
          if (!(mm & (m & -m))) throw SimError("warp-sync", fmt("member mask 0x%08x does not name the executing lane", mm), __builtin_ctz(m)); }
        if (need & ~w.active) {
          hold(w, s, m, w.blk);
          break;
        }
        I.fn(w, I, I.kind == K_WSYNC ? m & need : m);
        w.pc++;
        break;
      }
      case K_WARPBAR: {
        if (!m) { w.pc++; break; }
        u32 mm = w.R<u32>(I.o[0])[__builtin_ctz(m)];
        park(w, w.active, w.pc + 1);
        EACH(m) w.wbarmask[i] = mm;
        w.blk |= m; w.wbar |= m;
        if (!(mm & w.live & ~w.wbar)) { w.blk &= ~mm; w.wbar &= ~mm; }
        w.active = 0;
        pick(w);
        break;
      }
      case K_POLL: {
        if (!m) { w.pc++; break; }
        w.ctl = 0;
        I.fn(w, I, m);
        if (!w.ctl) { w.pc++; break; }
        hold(w, s, m, w.poll);
        break;
      }
    }
    if (!w.active) return;
  }
  }
}

// ---- groups of CTAs -----------------------------------------------------------------------------------------------------
struct Pool {  // memory reused from CTA to CTA
  std::vector<std::vector<u8>> rf, local, smem;
  std::vector<Warp*> warps;
  std::vector<Cta*> ctas;
  std::vector<Cluster*> clusters;
};
static std::string describe(Group& g) {
  std::string o;
  int n = 0;
  for (Warp* w : g.warps) {
    if (w->done) continue;
    if (n++ >= 8) { o += "; ..."; break; }
    u32 b = w->barw | w->poll | w->blk;
    int l = b ? __builtin_ctz(b) : 0;
    const Insn& I = w->prog->code[w->lpc[l]];
    o += fmt("%sblock (%u,%u,%u) warp %u ", n > 1 ? "; " : "", w->cta->id[0], w->cta->id[1], w->cta->id[2], w->wid);
    if (w->barw >> l & 1) { NamedBar& nb = w->cta->bars[w->barid[l]]; o += fmt("at barrier %u (PTX line %u; %u of %u threads arrived)", w->barid[l], w->barline[l], nb.arrived, nb.expected ? nb.expected : live_threads(*w->cta)); }
    else if (w->poll >> l & 1) o += fmt("waiting at PTX line %u", I.line);
    else o += fmt("blocked at PTX line %u", I.line);
  }
  return o;
}
static void run_group(Worker& k, Group& g, Warp** cur) {
  LaunchArgs* L = k.L;
  bool chk = L->check_uninit_reg || L->check_wgmma_regs;
  std::vector<Warp*> ready;
  u64 lastev = ~0ull;
  int rounds = 0;
  k.group_steps = 0;
  size_t alive = g.warps.size();
  while (alive) {
    ready.clear();
    for (Warp* w : g.warps) if (!w->done && !w->blocked) ready.push_back(w);
    if (ready.empty()) {
      bool any = false;
      for (Warp* w : g.warps) if (w->poll) any = true;
      if (!any || (lastev == g.events && ++rounds > 50)) {
        *cur = nullptr;
        for (Warp* w : g.warps) if (!w->done) { *cur = w; break; }
        Warp* w = *cur;
        u32 b = w->barw | w->poll | w->blk;
        if (b) w->pc = w->lpc[__builtin_ctz(b)];
        throw SimError("deadlock", "deadlock: no warp can make progress: " + describe(g));
      }
      if (lastev != g.events) { lastev = g.events; rounds = 0; }
      for (Warp* w : g.warps) if (w->poll) w->timeout = 1;
      wake_polled(g);
      lastev++;
      continue;
    }
    Warp* w = ready.size() == 1 ? ready[0] : ready[k.rng() % ready.size()];
    *cur = w;
    u64 n0 = w->ninsn;
    s64 q = ready.size() == 1 ? 4096 : 1 + k.rng() % L->quantum;
    if (chk) run_warp<true>(*w, q); else run_warp<false>(*w, q);
    k.steps += w->ninsn - n0;
    k.group_steps += w->ninsn - n0 + 1;
    if (k.group_steps > L->max_steps) throw SimError("limit", fmt("the blocks executed more than %llu warp instructions (max_steps): an endless loop?", (unsigned long long)L->max_steps));
    if (w->done) {
      alive--;
      if (w->nbar > k.summary[SM_MAX_WARP_BARS]) k.summary[SM_MAX_WARP_BARS] = w->nbar;
      k.summary[SM_BARS] += w->nbar;
      if (w->ninsn > k.summary[SM_MAX_WARP_INSNS]) k.summary[SM_MAX_WARP_INSNS] = w->ninsn;
      w->cta->insns += w->ninsn;
      for (u32 b = 0; b < 16; b++) if (w->cta->bars[b].arrived && !w->cta->bars[b].expected) bar_check(*w->cta, b);
    }
  }
}
struct Shared {
  std::atomic<u64> next{0};
  std::atomic<bool> stop{false};
  std::mutex mu;
  int code = 0;
};
static void splat(const Program& p, u8* rf) {
  for (auto& c : p.consts)
    for (int i = 0; i < 32; i++) {
      if (c.size == 0) { u32 v = c.lo ? FULL : 0; memcpy(rf + c.off, &v, 4); break; }
      memset(rf + c.off + (size_t)i * c.size, 0, c.size);
      memcpy(rf + c.off + (size_t)i * c.size, &c.lo, std::min<u32>(c.size, 8));
    }
}
static void worker(const Program* P, LaunchArgs* L, Shared* S, u32 tid, std::vector<Worker*>* out) {
  Worker& k = *(*out)[tid];
  k.prog = P;
  k.L = L;
  k.csr = CSR_DEFAULT;
  _mm_setcsr(CSR_DEFAULT);
  k.stats.resize(P->code.size());
  memset(k.stats.data(), 0, sizeof(Stat) * k.stats.size());
  k.rcache.assign(P->code.size(), 0);
  k.ldb.assign(L->nbits / 8 + 1, 0);
  k.stb.assign(L->nbits / 8 + 1, 0);
  k.summary[SM_MIN_CTA_INSNS] = ~0ull;
  u32 csize = L->cluster[0] * L->cluster[1] * L->cluster[2];
  u64 ncta = (u64)L->grid[0] * L->grid[1] * L->grid[2], ncl = ncta / csize;
  u64 ngroup = L->cooperative ? 1 : ncl, clper = L->cooperative ? ncl : 1;
  u32 nthr = L->block[0] * L->block[1] * L->block[2], nw = (nthr + 31) / 32;
  u32 smem = L->shared_bytes;
  Group g;
  for (u64 cl = 0; cl < clper; cl++) {
    Cluster* C = new Cluster;
    C->g = &g;
    C->nwarps = nw * csize;
    for (u32 r = 0; r < csize; r++) {
      Cta* c = new Cta;
      c->cl = C;
      c->rank = r;
      c->smem_bytes = smem;
      c->smem = (u8*)aligned_alloc(1024, (smem + 2047) & ~1023u);
      c->ngran = (L->check_race || L->check_uninit_shared) ? (smem >> P->gran_shift) + 5 : 0;
      c->W.assign(c->ngran, 0);
      c->Wpc.assign(c->ngran, 0);
      c->Rpc.assign(c->ngran, 0);
      c->R.assign((size_t)c->ngran * C->nwarps, 0);
      for (u32 q = 0; q < nw; q++) {
        Warp* w = new Warp();
        w->rf = (u8*)aligned_alloc(64, (P->rf_bytes + 127) & ~63u);
        memset(w->rf, 0, P->rf_bytes);
        w->prog = P;
        w->wk = &k;
        w->cta = c;
        w->wid = q;
        w->actor = r * nw + q;
        w->local = (u8*)calloc((size_t)P->local_bytes * 32 + 64, 1);
        splat(*P, w->rf);
        c->warps.push_back(w);
        g.warps.push_back(w);
      }
      C->ctas.push_back(c);
    }
    g.clusters.push_back(C);
  }
  k.g = &g;
  Warp* cur = nullptr;
  try {
    while (!S->stop) {
      u64 gi = S->next++;
      if (gi >= ngroup) break;
      k.rng.seed(L->seed * 7919u + (u32)gi);
      if (k.clk_base > (1u << 22)) {
        k.clk_base = 1;
        for (auto* C : g.clusters) for (auto* c : C->ctas) std::fill(c->R.begin(), c->R.end(), 0);
      }
      u32 maxclk = k.clk_base;
      for (u64 ci = 0; ci < clper; ci++) {
        Cluster* C = g.clusters[ci];
        u64 cl = L->cooperative ? ci : gi;
        u32 gx = L->grid[0] / L->cluster[0], gy = L->grid[1] / L->cluster[1];
        u32 cx = cl % gx, cy = (cl / gx) % gy, cz = cl / ((u64)gx * gy);
        C->nactors = C->nwarps;
        C->barrier_arrived = C->barrier_phase = 0;
        C->barrier_vc.fill(k.clk_base);
        C->barrier_done.fill(k.clk_base);
        C->sync.clear();
        for (u32 r = 0; r < csize; r++) {
          Cta* c = C->ctas[r];
          u32 rx = r % L->cluster[0], ry = (r / L->cluster[0]) % L->cluster[1], rz = r / (L->cluster[0] * L->cluster[1]);
          c->id[0] = cx * L->cluster[0] + rx;
          c->id[1] = cy * L->cluster[1] + ry;
          c->id[2] = cz * L->cluster[2] + rz;
          c->linear = c->id[0] + (u64)L->grid[0] * (c->id[1] + (u64)L->grid[1] * c->id[2]);
          c->insns = 0;
          c->waited = false;
          memset(c->smem, L->smem_fill, smem);
          std::fill(c->W.begin(), c->W.end(), 0);
          for (auto& R : c->R) if (R == FULL) R = 0;
          for (auto& b : c->bars) b = NamedBar();
          c->mbars.clear();
          for (Warp* w : c->warps) {
            w->pc = 0;
            u32 nl = std::min(32u, nthr - w->wid * 32);
            w->live = w->active = nl == 32 ? FULL : (1u << nl) - 1;
            w->blk = w->barw = w->poll = w->wbar = 0;
            w->div = false; w->divcount = 0; w->blocked = w->done = false; w->timeout = 0; w->cc = 0;
            w->vc.fill(k.clk_base);
            w->vc.c[w->actor]++;
            w->waited = 0;
            w->cpa.clear();
            memset(w->cpgroup, 0, sizeof w->cpgroup);
            memset(w->bulkgroup, 0, sizeof w->bulkgroup);
            w->wg_reads.clear(); w->wg_regs.clear(); w->wg_group = 0;
            w->nbar = w->ninsn = 0;
            for (auto& s : w->rstack) s.clear();
            w->fbusy.assign(P->funcs.size(), 0);
            if (L->check_uninit_reg) {
              w->reginit.assign(P->rf_bytes / 4 + 1, 0);
              for (auto& q : P->consts) w->reginit[q.off >> 2] = FULL;
              for (u32 s : P->spec) if (s != NONE) w->reginit[s >> 2] = FULL;
            }
            auto set = [&](int s, u32 v) { if (P->spec[s] != NONE) { u32* d = w->R<u32>(P->spec[s]); LANES d[i] = v; } };
            for (int i = 0; i < 32; i++) {
              u32 t = w->wid * 32 + i, tx = t % L->block[0], ty = (t / L->block[0]) % L->block[1], tz = t / (L->block[0] * L->block[1]);
              if (P->spec[S_TID_X] != NONE) w->R<u32>(P->spec[S_TID_X])[i] = tx;
              if (P->spec[S_TID_Y] != NONE) w->R<u32>(P->spec[S_TID_Y])[i] = ty;
              if (P->spec[S_TID_Z] != NONE) w->R<u32>(P->spec[S_TID_Z])[i] = tz;
              auto lane = [&](int s, u32 v) { if (P->spec[s] != NONE) w->R<u32>(P->spec[s])[i] = v; };
              lane(S_LANEID, i);
              lane(S_LM_EQ, 1u << i); lane(S_LM_LT, (1u << i) - 1); lane(S_LM_LE, (2u << i) - 1);
              lane(S_LM_GT, ~((2u << i) - 1)); lane(S_LM_GE, ~((1u << i) - 1));
            }
            for (int d = 0; d < 3; d++) {
              set(S_NTID_X + d, L->block[d]); set(S_CTAID_X + d, c->id[d]); set(S_NCTAID_X + d, L->grid[d]);
              set(S_CLUSTERID_X + d, d == 0 ? cx : d == 1 ? cy : cz); set(S_NCLUSTERID_X + d, L->grid[d] / L->cluster[d]);
              set(S_CLUSTER_CTAID_X + d, d == 0 ? rx : d == 1 ? ry : rz); set(S_CLUSTER_NCTAID_X + d, L->cluster[d]);
            }
            set(S_WARPID, w->wid); set(S_NWARPID, nw); set(S_SMID, (u32)(c->linear % L->nsm)); set(S_NSMID, L->nsm); set(S_GRIDID, 1);
            set(S_CLUSTER_CTARANK, r); set(S_CLUSTER_NCTARANK, csize); set(S_DYN_SMEM, L->dyn_shared); set(S_TOTAL_SMEM, smem);
            set(S_IS_EXPLICIT_CLUSTER, csize > 1);
          }
        }
      }
      run_group(k, g, &cur);
      for (auto* C : g.clusters) for (auto* c : C->ctas) {
        if (L->dependent && !c->waited) throw SimError("dependent-launch", "a block ended without griddepcontrol.wait: the grid could end before the one that it depends on");
        for (auto* w : c->warps) maxclk = std::max(maxclk, w->vc.c[w->actor]);
        for (auto& b : c->mbars) maxclk = std::max(maxclk, b.second.clk);
        k.summary[SM_CTAS]++;
        k.summary[SM_WARPS] += c->warps.size();
        k.summary[SM_MAX_CTA_INSNS] = std::max(k.summary[SM_MAX_CTA_INSNS], c->insns);
        k.summary[SM_MIN_CTA_INSNS] = std::min(k.summary[SM_MIN_CTA_INSNS], c->insns);
      }
      k.clk_base = maxclk + 2;
    }
  } catch (SimError& e) {
    std::lock_guard<std::mutex> lk(S->mu);
    if (!S->stop) {
      S->stop = true;
      S->code = 1;
      u32 ln = cur ? P->code[cur->pc].line : 0;
      snprintf(L->errbuf, L->errlen, "%s\x1f%u\x1f%d\x1f%d\x1f%d\x1f%d\x1f%d\x1f%llu\x1f%s", e.what_kind.c_str(), ln, cur ? (int)cur->cta->id[0] : -1, cur ? (int)cur->cta->id[1] : -1,
               cur ? (int)cur->cta->id[2] : -1, cur ? (int)cur->wid : -1, e.lane, (unsigned long long)e.addr, e.what());
    }
  }
  k.summary[SM_STEPS] = k.steps;
  _mm_setcsr(CSR_DEFAULT);
  for (auto* C : g.clusters) {
    for (auto* c : C->ctas) { for (auto* w : c->warps) { free(w->rf); free(w->local); delete w; } free(c->smem); delete c; }
    delete C;
  }
}
}  // namespace ptxe

using namespace ptxe;
extern "C" {
int ptxe_has_op(const char* n) { return registry().count(n); }
int ptxe_list_ops(char* buf, int len) {
  std::string s;
  for (auto& p : registry()) s += p.first + "\n";
  if ((int)s.size() + 1 < len) memcpy(buf, s.c_str(), s.size() + 1);
  return (int)s.size() + 1;
}
// insn table: 26 int64 columns per instruction, see lower.py
void* ptxe_program(const char* name, const char* const* ops, const s64* t, u32 n, const u32* pool, u32 npool, const u32* regl, u32 nregl,
                   const u64* consts, u32 nconst, const u32* spec, u32 rf, u32 local, u32 gran, const u32* funcs, u32 nfunc, const u32* slots,
                   u32 nslots, const u32* brx, u32 nbrx) {
  Program* p = new Program;
  p->name = name;
  p->pool.assign(pool, pool + npool);
  p->reglist.assign(regl, regl + nregl);
  p->code.resize(n);
  for (u32 k = 0; k < n; k++) {
    const s64* r = t + (size_t)k * 26;
    Insn& I = p->code[k];
    memset(&I, 0, sizeof I);
    auto it = registry().find(ops[r[0]]);
    if (it == registry().end()) { delete p; return nullptr; }
    I.fn = it->second;
    I.kind = r[1]; I.guard = r[2]; I.gp = r[3]; I.leader = r[4]; I.line = r[5]; I.imm = r[6]; I.csr = r[7];
    I.o = p->pool.data() + r[8];
    I.no = r[9];
    for (int j = 0; j < 8; j++) I.m[j] = (s32)r[10 + j];
    I.src0 = r[18]; I.nsrc = r[19]; I.dst0 = r[20]; I.ndst = r[21]; I.chk = r[22];
    I.idx = k;
  }
  for (u32 k = 0; k < nconst; k++) p->consts.push_back({(u32)consts[3 * k], (u32)consts[3 * k + 1], consts[3 * k + 2]});
  memcpy(p->spec, spec, sizeof p->spec);
  p->rf_bytes = rf;
  p->local_bytes = local;
  p->gran_shift = gran;
  for (u32 k = 0; k < nfunc; k++) p->funcs.push_back({funcs[4 * k], funcs[4 * k + 1], funcs[4 * k + 2], funcs[4 * k + 3]});
  p->func_slots.assign(slots, slots + nslots);
  for (u32 k = 0; k < nbrx;) { u32 c = brx[k++]; p->brx.emplace_back(brx + k, brx + k + c); k += c; }
  return p;
}
void ptxe_free(void* p) { delete (Program*)p; }
u32 ptxe_spec_count() { return S_COUNT; }
int ptxe_launch(void* prog, LaunchArgs* L) {
  Program* P = (Program*)prog;
  Shared S;
  std::vector<Worker*> ws;
  for (u32 k = 0; k < L->nthreads; k++) ws.push_back(new Worker());
  std::vector<std::thread> th;
  for (u32 k = 1; k < L->nthreads; k++) th.emplace_back(worker, P, L, &S, k, &ws);
  u32 old = _mm_getcsr();
  worker(P, L, &S, 0, &ws);
  _mm_setcsr(old);
  for (auto& t : th) t.join();
  std::string out;
  L->summary[SM_MIN_CTA_INSNS] = ~0ull;
  for (auto* k : ws) {
    for (size_t j = 0; j < k->stats.size(); j++) {
      u64 *a = (u64*)&L->stats[j], *b = (u64*)&k->stats[j];
      for (size_t q = 0; q < sizeof(Stat) / 8; q++) a[q] += b[q];
    }
    for (size_t j = 0; j < k->ldb.size() && j < L->nbits / 8 + 1; j++) { L->ld_bits[j] |= k->ldb[j]; L->st_bits[j] |= k->stb[j]; }
    for (int j = 0; j < 64; j++) {
      if (j == SM_MIN_CTA_INSNS) L->summary[j] = std::min(L->summary[j], k->summary[j]);
      else if (j == SM_MAX_CTA_INSNS || j == SM_MAX_WARP_BARS || j == SM_MAX_PENDING_CPASYNC || j == SM_SMEM_HIGH || j == SM_MAX_WARP_INSNS) L->summary[j] = std::max(L->summary[j], k->summary[j]);
      else L->summary[j] += k->summary[j];
    }
    out += k->out;
    delete k;
  }
  if (L->outlen) { size_t n = std::min<size_t>(out.size(), L->outlen - 1); memcpy(L->outbuf, out.data(), n); L->outbuf[n] = 0; }
  return S.code;
}
}
