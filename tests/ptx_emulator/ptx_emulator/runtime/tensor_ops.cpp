// Tensor-core instructions: mma.sync and wgmma.
//
// Numerics: the products of one instruction are exact in f32 (f16/bf16/tf32/fp8 inputs); their sum over k is
// formed in f32 with fused multiply-adds from zero and then added once to the accumulator, rounding to nearest.
#include "engine.hpp"
namespace ptxe {
enum MT { M_F16, M_BF16, M_TF32, M_E4M3, M_E5M2, M_S8, M_U8, M_F64, M_S4, M_U4 };
static float T43[256], T52[256];
static bool init_tabs = [] {
  for (int i = 0; i < 256; i++) { T43[i] = (float)decode_float(i, 4, 3, true); T52[i] = (float)decode_float(i, 5, 2, false); }
  return true;
}();
static inline int per_reg(int t) { return t <= M_BF16 ? 2 : t == M_TF32 ? 1 : 4; }
static inline float elem(u32 r, int t, int e) {
  switch (t) {
    case M_F16: return h2f(r >> (16 * e));
    case M_BF16: return bitcast<float>(e ? r & 0xffff0000u : r << 16);
    case M_TF32: return bitcast<float>(r & 0xffffe000u);
    case M_E4M3: return T43[(r >> (8 * e)) & 255];
    default: return T52[(r >> (8 * e)) & 255];
  }
}
static inline s32 ielem(u32 r, int t, int e) { u8 b = r >> (8 * e); return t == M_S8 ? (s32)(s8)b : (s32)b; }
// 32 packed 16-bit pairs to their low and high halves in f32
static inline void halves(const u32* v, int t, float* lo, float* hi) {
  if (t == M_BF16) {
    u32 *l = (u32*)lo, *h = (u32*)hi;
    VLANES { l[i] = v[i] << 16; h[i] = v[i] & 0xffff0000u; }
  } else {
    const __m128i pick = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    for (int i = 0; i < 32; i += 4) {
      __m256 f = _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(v + i)), pick));
      _mm_storeu_ps(lo + i, _mm256_castps256_ps128(f));
      _mm_storeu_ps(hi + i, _mm256_extractf128_ps(f, 1));
    }
  }
}
static void fragA16(Warp& w, const u32* regs, int t, int K, float (*A)[64]) {
  alignas(32) float lo[32], hi[32];
  for (int r = 0; r < K / 4; r++) {
    halves(w.R<u32>(regs[r]), t, lo, hi);
    int rowo = (r & 1) * 8, ko = (r >> 1) * 8;
    for (int g = 0; g < 8; g++) {
      __m128 l = _mm_load_ps(lo + 4 * g), h = _mm_load_ps(hi + 4 * g);
      _mm_storeu_ps(&A[g + rowo][ko], _mm_unpacklo_ps(l, h));
      _mm_storeu_ps(&A[g + rowo][ko + 4], _mm_unpackhi_ps(l, h));
    }
  }
}
static void fragB16(Warp& w, const u32* regs, int t, int K, float (*B)[8]) {
  alignas(32) float lo[32], hi[32];
  for (int r = 0; r < K / 8; r++) {
    halves(w.R<u32>(regs[r]), t, lo, hi);
    for (int q = 0; q < 4; q++)
      for (int g = 0; g < 8; g++) { B[r * 8 + 2 * q][g] = lo[4 * g + q]; B[r * 8 + 2 * q + 1][g] = hi[4 * g + q]; }
  }
}
// A: M=16 rows x K; B: K x 8
template <class T> static void fragA(Warp& w, const u32* regs, int t, int K, T (*A)[64]) {
  int pr = per_reg(t), n = 16 * K / 32 / pr;
  for (int r = 0; r < n; r++) {
    const u32* v = w.R<u32>(regs[r]);
    int rowo = (r & 1) * 8, ko = (r >> 1) * 4 * pr;
    LANES for (int e = 0; e < pr; e++) {
      if constexpr (std::is_same<T, float>::value) A[i / 4 + rowo][ko + (i & 3) * pr + e] = elem(v[i], t, e);
      else A[i / 4 + rowo][ko + (i & 3) * pr + e] = ielem(v[i], t, e);
    }
  }
}
template <class T> static void fragB(Warp& w, const u32* regs, int t, int K, T (*B)[8]) {
  int pr = per_reg(t), n = 8 * K / 32 / pr;
  for (int r = 0; r < n; r++) {
    const u32* v = w.R<u32>(regs[r]);
    int ko = r * 4 * pr;
    LANES for (int e = 0; e < pr; e++) {
      if constexpr (std::is_same<T, float>::value) B[ko + (i & 3) * pr + e][i / 4] = elem(v[i], t, e);
      else B[ko + (i & 3) * pr + e][i / 4] = ielem(v[i], t, e);
    }
  }
}
// o = [D regs, A regs, B regs, C regs]; m0 A type, m1 B type, m2 K, m3 accumulator f16?, m4 = D f16?, m5 saturate (int), m6 = M
static void hMma(Warp& w, const Insn& I, u32) {
  csr(w, CSR_DEFAULT);
  int ta = I.m[0], tb = I.m[1], K = I.m[2], M = I.m[6];
  int nd = I.m[4] ? 2 : 4, nc = I.m[3] ? 2 : 4, na = 16 * K / 32 / per_reg(ta), nb = 8 * K / 32 / per_reg(tb);
  if (M == 8) { na = 8 * K / 32 / per_reg(ta); nd = nc = 2; }
  const u32 *oD = I.o, *oA = oD + nd, *oB = oA + na, *oC = oB + nb;
  if (ta == M_S8 || ta == M_U8) {
    s32 A[16][64], B[64][8];
    if (M == 8) { u32 rg[4] = {0, 0, 0, 0}; for (int r = 0; r < na; r++) { rg[0] = oA[r]; const u32* v = w.R<u32>(rg[0]); LANES for (int e = 0; e < 4; e++) A[i / 4][r * 16 + (i & 3) * 4 + e] = ielem(v[i], ta, e); } }
    else fragA<s32>(w, oA, ta, K, A);
    fragB<s32>(w, oB, tb, K, B);
    s32 out[4][32];
    for (int r = 0; r < nd; r++) {
      const s32* c = w.R<s32>(oC[r]);
      LANES {
        int row = i / 4 + (r >> 1) * 8, col = (i & 3) * 2 + (r & 1);
        s64 s = c[i];
        if (I.m[5]) { for (int k = 0; k < K; k++) s += (s64)A[row][k] * B[k][col]; s = std::min<s64>(std::max<s64>(s, INT32_MIN), INT32_MAX); }
        else { u32 u = (u32)c[i]; for (int k = 0; k < K; k++) u += (u32)(A[row][k] * B[k][col]); s = (s32)u; }
        out[r][i] = (s32)s;
      }
    }
    for (int r = 0; r < nd; r++) memcpy(w.R<s32>(oD[r]), out[r], 128);
    return;
  }
  alignas(32) float A[16][64], B[64][8], S[16][8];
  if (ta <= M_BF16) fragA16(w, oA, ta, K, A); else fragA<float>(w, oA, ta, K, A);
  if (tb <= M_BF16) fragB16(w, oB, tb, K, B); else fragB<float>(w, oB, tb, K, B);
  for (int r = 0; r < 16; r += 4) {
    __m256 s[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int k = 0; k < K; k++) {
      __m256 b = _mm256_load_ps(B[k]);
      for (int q = 0; q < 4; q++) s[q] = _mm256_fmadd_ps(_mm256_set1_ps(A[r + q][k]), b, s[q]);
    }
    for (int q = 0; q < 4; q++) _mm256_store_ps(S[r + q], s[q]);
  }
  float C[4][32];
  if (I.m[3]) for (int r = 0; r < 2; r++) { const u32* c = w.R<u32>(oC[r]); LANES { C[2 * r][i] = h2f(c[i]); C[2 * r + 1][i] = h2f(c[i] >> 16); } }
  else for (int r = 0; r < 4; r++) memcpy(C[r], w.R<f32>(oC[r]), 128);
  for (int r = 0; r < 4; r++)
    for (int g = 0; g < 8; g++) {
      const float* row = &S[g + (r >> 1) * 8][r & 1];
      for (int q = 0; q < 4; q++) C[r][4 * g + q] += row[2 * q];
    }
  if (I.m[4]) for (int r = 0; r < 2; r++) { u32 t[32]; LANES t[i] = f2h(C[2 * r][i]) | (u32)f2h(C[2 * r + 1][i]) << 16; memcpy(w.R<u32>(oD[r]), t, 128); }
  else for (int r = 0; r < 4; r++) memcpy(w.R<f32>(oD[r]), C[r], 128);
}
REG("mma", hMma);
static void hMmaF64(Warp& w, const Insn& I, u32) {  // m8n8k4: o = D0 D1 A B C0 C1
  csr(w, CSR_DEFAULT);
  const f64 *a = w.R<f64>(I.o[2]), *b = w.R<f64>(I.o[3]);
  f64 d[2][32];
  for (int r = 0; r < 2; r++) { const f64* c = w.R<f64>(I.o[4 + r]); LANES { f64 s = c[i]; for (int k = 0; k < 4; k++) s = std::fma(a[(i / 4) * 4 + k], b[((i & 3) * 2 + r) * 4 + k], s); d[r][i] = s; } }
  for (int r = 0; r < 2; r++) memcpy(w.R<f64>(I.o[r]), d[r], 256);
}
REG("mma.f64", hMmaF64);

// ---- wgmma ------------------------------------------------------------------------------------------------
struct Desc { u32 start, lbo, sbo; int sw; };
static Desc desc(u64 d) { return {(u32)(d & 0x3fff) << 4, (u32)(d >> 16 & 0x3fff) << 4, (u32)(d >> 32 & 0x3fff) << 4, (int)(d >> 62)}; }
static inline u32 swz(u32 a, int sw) { return sw == 1 ? a ^ ((a >> 3) & 0x70) : sw == 2 ? a ^ ((a >> 3) & 0x30) : sw == 3 ? a ^ ((a >> 3) & 0x10) : a; }
// byte address of the 16-byte-aligned element (mn, k); es = element size
static inline u32 saddr(const Desc& d, int mn, int k, bool trans, int es) {
  int T = 16 / es;  // elements per 16 bytes
  u32 off;
  if (!trans) {  // K-major
    if (d.sw == 0) off = (mn & 7) * 16 + (mn >> 3) * d.sbo + (k / T) * d.lbo + (k % T) * es;
    else { u32 pitch = d.sw == 1 ? 128 : d.sw == 2 ? 64 : 32; off = (mn & 7) * pitch + (mn >> 3) * d.sbo + k * es; }
  } else {
    if (d.sw == 0) off = (mn % T) * es + (k & 7) * 16 + (mn / T) * d.sbo + (k >> 3) * d.lbo;
    else { int wd = (d.sw == 1 ? 128 : d.sw == 2 ? 64 : 32), n = wd / es; off = (mn % n) * es + (mn / n) * d.lbo + (k & 7) * wd + (k >> 3) * d.sbo; }
  }
  return swz(d.start + off, d.sw);
}
// o = [D.. , A (4 regs, or descriptor), B descriptor, scale-d pred]; m0 type, m1 K, m2 N, m3 flags: 1 A in registers, 2 D f16,
// 4 integer, 8 B type differs; m4 imm-scale-a/b signs (bit0: -A, bit1: -B), m5 trans (bit0 A, bit1 B), m6 B type
static void hWgmma(Warp& w, const Insn& I, u32) {
  csr(w, CSR_DEFAULT);
  int t = I.m[0], tb = I.m[6], K = I.m[1], N = I.m[2], fl = I.m[3];
  bool areg = fl & 1, df16 = fl & 2;
  int nd = df16 ? N / 4 : N / 2, es = 4 / per_reg(t);
  if (t == M_S8 || t == M_U8) es = 1;
  const u32 *oD = I.o, *oA = oD + nd, *oB = oA + (areg ? 4 : 1), *oP = oB + 1;
  Cta& c = *w.cta;
  bool ints = t >= M_S8;
  alignas(32) static thread_local float A[16][64], B[64][256], S[16][256];
  u32 row0 = (w.wid & 3) * 16, sd = 0;
  auto val = [&](u32 a, int ty) -> float {
    const u8* p = c.smem + a;
    switch (ty) {
      case M_F16: { u16 v; memcpy(&v, p, 2); return h2f(v); }
      case M_BF16: { u16 v; memcpy(&v, p, 2); return b2f(v); }
      case M_TF32: { u32 v; memcpy(&v, p, 4); return bitcast<float>(v & 0xffffe000u); }
      case M_E4M3: return T43[*p];
      case M_E5M2: return T52[*p];
      case M_S8: return (s8)*p;
      default: return *p;
    }
  };
  u32 last = FULL;
  auto touch = [&](u32 a) {  // once per 16-byte row
    u32 q = a & ~15u;
    if (q == last) return;
    last = q;
    shared_bounds(w, c, q, 16, 16, 0);
    shadow_read(w, c, q, 16, I.idx, 0, true);
    if (w.wk->L->check_race) { u32 sh = w.prog->gran_shift; u32* R = c.R.data() + (size_t)w.actor * c.ngran; for (u32 g = q >> sh; g <= (q + 15) >> sh; g++) R[g] = FULL; w.wg_reads.push_back({&c, q, 16, w.wg_group}); }
  };
  if (areg) {
    if (ints) { s32 Ai[16][64]; fragA<s32>(w, oA, t, K, Ai); for (int r = 0; r < 16; r++) for (int k = 0; k < K; k++) A[r][k] = Ai[r][k]; }
    else fragA<float>(w, oA, t, K, A);
  } else {
    Desc d = desc(w.R<u64>(oA[0])[0]);
    bool tr = I.m[5] & 1;
    for (int r = 0; r < 16; r++) for (int k = 0; k < K; k++) { u32 a = saddr(d, row0 + r, k, tr, es); touch(a); A[r][k] = val(a, t); }
  }
  Desc d = desc(w.R<u64>(oB[0])[0]);
  bool trb = I.m[5] & 2;
  if (trb) { for (int k = 0; k < K; k++) for (int n = 0; n < N; n++) { u32 a = saddr(d, n, k, true, es); touch(a); B[k][n] = val(a, tb); } }
  else for (int n = 0; n < N; n++) for (int k = 0; k < K; k++) { u32 a = saddr(d, n, k, false, es); touch(a); B[k][n] = val(a, tb); }
  float sg = (I.m[4] == 1 || I.m[4] == 2) ? -1.f : 1.f;
  for (int r = 0; r < 16; r++) for (int n0 = 0; n0 < N; n0 += 8) {
    __m256 s = _mm256_setzero_ps();
    for (int k = 0; k < K; k++) s = _mm256_fmadd_ps(_mm256_set1_ps(A[r][k] * sg), _mm256_load_ps(&B[k][n0]), s);
    _mm256_store_ps(&S[r][n0], s);
  }
  sd = w.P(*oP);
  for (int j = 0; j < N / 8; j++) for (int r = 0; r < 4; r++) {
    if (df16) {
      u32* D = w.R<u32>(oD[2 * j + (r >> 1)]);
      LANES { u32 v = D[i]; u16 h = v >> (16 * (r & 1)); float x = (sd >> i & 1 ? h2f(h) : 0.f) + S[i / 4 + (r >> 1) * 8][8 * j + (i & 3) * 2 + (r & 1)];
        u32 e = f2h(x); D[i] = r & 1 ? (v & 0xffff) | e << 16 : (v & 0xffff0000) | e; }
    } else if (ints) {
      s32* D = w.R<s32>(oD[4 * j + r]);
      LANES D[i] = (sd >> i & 1 ? D[i] : 0) + (s32)S[i / 4 + (r >> 1) * 8][8 * j + (i & 3) * 2 + (r & 1)];
    } else {
      f32* D = w.R<f32>(oD[4 * j + r]);
      LANES D[i] = (sd >> i & 1 ? D[i] : 0.f) + S[i / 4 + (r >> 1) * 8][8 * j + (i & 3) * 2 + (r & 1)];
    }
  }
  if (w.wk->L->check_wgmma_regs) {
    for (int j = 0; j < nd; j++) w.wg_regs.push_back({oD[j], w.wg_group, true});
    if (areg) for (int j = 0; j < 4; j++) w.wg_regs.push_back({oA[j], w.wg_group, false});
  }
}
REG("wgmma", hWgmma);
static void hWgCommit(Warp& w, const Insn&, u32) { w.wg_group++; }
REG("wgmma.commit", hWgCommit);
static void hWgWait(Warp& w, const Insn& I, u32) {
  u32 keep = I.m[0];
  size_t k = 0;
  for (auto& p : w.wg_reads) {
    if (p.group + keep < w.wg_group) {
      u32 sh = w.prog->gran_shift;
      u32* R = p.c->R.data() + (size_t)w.actor * p.c->ngran;
      for (u32 g = p.off >> sh; g <= (p.off + p.len - 1) >> sh; g++) R[g] = w.vc.c[w.actor];
    } else w.wg_reads[k++] = p;
  }
  w.wg_reads.resize(k);
  for (auto& p : w.wg_reads) {  // still pending ones keep their mark
    u32 sh = w.prog->gran_shift;
    u32* R = p.c->R.data() + (size_t)w.actor * p.c->ngran;
    for (u32 g = p.off >> sh; g <= (p.off + p.len - 1) >> sh; g++) R[g] = FULL;
  }
  k = 0;
  for (auto& p : w.wg_regs) if (p.group + keep >= w.wg_group) w.wg_regs[k++] = p;
  w.wg_regs.resize(k);
}
REG("wgmma.wait", hWgWait);
}  // namespace ptxe
