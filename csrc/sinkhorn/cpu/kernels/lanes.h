// Many small problems side by side, one per SIMD lane: an entry of all of them is a few vectors, and nothing crosses lanes but
// the transposition on the way from and to memory, where each problem's entries are neighbours.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cpu/half.h"
#include "common/cpu/score_tile.h"
#include "common/cpu/simd.h"

namespace comp_kernels::COMP_KERNELS_ISA {

// One number of kParts * kLanes<T> problems. Several parts are independent chains of work: they hide each other's latency.
template <typename T, int kParts>
struct Lanes {
  Vec<T> part[kParts];

  Lanes() = default;
  // Vector by vector: GCC copies a struct in pieces of 32 bytes, and a vector of 64 that is loaded soon after waits for both.
  CK_INLINE Lanes(const Lanes& other) { *this = other; }
  CK_INLINE Lanes& operator=(const Lanes& other) {
    for (int p = 0; p < kParts; ++p) part[p] = other.part[p];
    return *this;
  }

  template <typename F>
  static CK_INLINE Lanes of(F&& f) {
    Lanes result;
    for (int p = 0; p < kParts; ++p) result.part[p] = f(p);
    return result;
  }
  static CK_INLINE Lanes all(T x) {
    return of([x](int) { return broadcast(x); });
  }
  friend CK_INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
    return of([&](int p) { return a.part[p] + b.part[p]; });
  }
  friend CK_INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
    return of([&](int p) { return a.part[p] - b.part[p]; });
  }
  friend CK_INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
    return of([&](int p) { return a.part[p] * b.part[p]; });
  }
};

// All bits of a lane set, or none.
template <typename T, int kParts>
struct LaneMask {
  BitVec<T> part[kParts];

  template <typename F>
  static CK_INLINE LaneMask of(F&& f) {
    LaneMask result;
    for (int p = 0; p < kParts; ++p) result.part[p] = f(p);
    return result;
  }
  friend CK_INLINE LaneMask operator&(const LaneMask& a, const LaneMask& b) {
    return of([&](int p) { return a.part[p] & b.part[p]; });
  }
  CK_INLINE bool all() const {
    BitVec<T> both = part[0];
    for (int p = 1; p < kParts; ++p) both &= part[p];
    bool result = true;
    for (int i = 0; i < kLanes<T>; ++i) result &= both[i] != 0;
    return result;
  }
};

template <typename T, int kParts>
CK_INLINE LaneMask<T, kParts> operator==(const Lanes<T, kParts>& a, const Lanes<T, kParts>& b) {
  return LaneMask<T, kParts>::of([&](int p) { return a.part[p] == b.part[p]; });
}

template <typename T, int kParts>
CK_INLINE LaneMask<T, kParts> operator<=(const Lanes<T, kParts>& a, const Lanes<T, kParts>& b) {
  return LaneMask<T, kParts>::of([&](int p) { return a.part[p] <= b.part[p]; });
}

template <typename T, int kParts>
CK_INLINE Lanes<T, kParts> select(const LaneMask<T, kParts>& mask, const Lanes<T, kParts>& yes, const Lanes<T, kParts>& no) {
  return Lanes<T, kParts>::of([&](int p) { return select<T>(mask.part[p], yes.part[p], no.part[p]); });
}

// The larger and the smaller; b where either is NaN.
template <typename T, int kParts>
CK_INLINE Lanes<T, kParts> max(const Lanes<T, kParts>& a, const Lanes<T, kParts>& b) {
  return Lanes<T, kParts>::of([&](int p) { return max<T>(a.part[p], b.part[p]); });
}
template <typename T, int kParts>
CK_INLINE Lanes<T, kParts> min(const Lanes<T, kParts>& a, const Lanes<T, kParts>& b) {
  return Lanes<T, kParts>::of([&](int p) { return min<T>(a.part[p], b.part[p]); });
}

template <typename T, int kParts>
CK_INLINE Lanes<T, kParts> exp2(Lanes<T, kParts> x) {
  exp2(x.part);
  return x;
}
template <typename T, int kParts>
CK_INLINE Lanes<T, kParts> log2(const Lanes<T, kParts>& x) {
  return Lanes<T, kParts>::of([&](int p) { return log2<T>(x.part[p]); });
}

CK_INLINE Vec<double> quotient(Vec<double> a, Vec<double> b) { return a / b; }
CK_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  // 14 bits of 1 / b and one correction of the quotient: within one unit in the last place, at a third of the division's time.
  // Neither b nor a / b may be infinite or subnormal.
  const Vec<float> inverse = (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)b), close = a * inverse;
  return close + (a - b * close) * inverse;
#else
  return a / b;
#endif
}
template <typename T, int kParts>
CK_INLINE Lanes<T, kParts> quotient(const Lanes<T, kParts>& a, const Lanes<T, kParts>& b) {
  return Lanes<T, kParts>::of([&](int p) { return quotient(a.part[p], b.part[p]); });
}

// Lanes are transposed in groups of four, 16 bytes of floats, within which instructions interleave at once.
template <typename T>
constexpr int kGroup = kLanes<T> < 4 ? kLanes<T> : 4;

template <typename T, int... kLane>
CK_INLINE void zip(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = kLanes<T>, kWide = kGroup<T>;
  low = SHUFFLE(T, a, b, (kLane / kWide * kWide + kLane % kWide / 2 + kLane % 2 * kCount)...);
  high = SHUFFLE(T, a, b, (kLane / kWide * kWide + kWide / 2 + kLane % kWide / 2 + kLane % 2 * kCount)...);
}

// In each group of lanes, entry j of vector i becomes entry i of vector j. Each round interleaves the first half of the vectors
// with the second.
template <typename T>
CK_INLINE void transpose_groups(Vec<T>* x) {
  constexpr int kWide = kGroup<T>;
#pragma GCC unroll 2
  for (int round = 1; round < kWide; round *= 2) {
    Vec<T> zipped[kWide];
#pragma GCC unroll 2
    for (int i = 0; i < kWide / 2; ++i) {
      zip<T>(x[i], x[i + kWide / 2], zipped[2 * i], zipped[2 * i + 1], std::make_integer_sequence<int, kLanes<T>>{});
    }
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) x[i] = zipped[i];
  }
}

// The lanes of b that lack the bit kDistance change places with those of a that have it.
template <typename T, int kDistance, int... kLane>
CK_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = kLanes<T>;
  const Vec<T> low = SHUFFLE(T, a, b, ((kLane & kDistance) ? kCount + kLane - kDistance : kLane)...);
  b = SHUFFLE(T, a, b, ((kLane & kDistance) ? kCount + kLane : kLane + kDistance)...);
  a = low;
}

// Entry j of vector i becomes entry i of vector j: whole groups change places, then lanes within them.
template <typename T, int kDistance = kLanes<T> / 2>
CK_INLINE void transpose(Vec<T> (&x)[kLanes<T>]) {
  constexpr int kCount = kLanes<T>;
  if constexpr (kDistance >= kGroup<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      if (!(i & kDistance)) exchange<T, kDistance>(x[i], x[i + kDistance], std::make_integer_sequence<int, kCount>{});
    }
    transpose<T, kDistance / 2>(x);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; i += kGroup<T>) transpose_groups<T>(x + i);
  }
}

// Where problem `first` + lane lies: `count` neighbouring numbers at base + item * stride. Lanes beyond the last problem read
// that one again, and are not written.
struct Problems {
  int64_t first, last, stride;
  CK_INLINE int64_t offset(int lane) const { return std::min(first + lane, last) * stride; }
  CK_INLINE int lanes(int wanted) const { return static_cast<int>(std::min<int64_t>(wanted, last - first + 1)); }
};

// Calls block(begin) for pieces of kWide that cover 0 .. count - 1; the last one may overlap the one before it.
template <int kWide, typename F>
CK_INLINE void cover(int count, F&& block) {
  for (int begin = 0; begin < count; begin += kWide) block(std::min(begin, count - kWide));
}

// part p of to[slot[e]] = number e of all problems. Fewer numbers than lanes go one by one: a transposition of whole vectors would
// take longer.
template <typename S, typename T, int kParts>
[[gnu::noinline]] void load_lanes(Lanes<T, kParts>* to, int p, const S* base, const Problems& at, int count, const uint16_t* slot) {
  constexpr int kCount = kLanes<T>;
  if (at.stride == 0) {  // the same for all
    for (int e = 0; e < count; ++e) to[slot[e]].part[p] = broadcast<T>(widen(base[e]));
    return;
  }
  if (count < kCount) {
    T block[kCount][kCount];
    for (int lane = 0; lane < kCount; ++lane) {
      const S* from = base + at.offset(lane);
      for (int e = 0; e < count; ++e) block[e][lane] = widen(from[e]);
    }
    for (int e = 0; e < count; ++e) to[slot[e]].part[p] = load(block[e]);
    return;
  }
  const S* from[kCount];
  for (int lane = 0; lane < kCount; ++lane) from[lane] = base + at.offset(lane);
  cover<kCount>(count, [&](int begin) {
    Vec<T> x[kCount];
    for (int lane = 0; lane < kCount; ++lane) x[lane] = load_widened(from[lane] + begin);
    transpose<T>(x);
    for (int j = 0; j < kCount; ++j) to[slot[begin + j]].part[p] = x[j];
  });
}

// The way back: number e of all problems = part p of from[slot[e]]; fewer numbers than lanes go in groups, if they are as many.
template <typename S, typename T, int kParts>
[[gnu::noinline]] void store_lanes(const Lanes<T, kParts>* from, int p, S* base, const Problems& at, int count,
                                   const uint16_t* slot) {
  constexpr int kCount = kLanes<T>;
  const int lanes = at.lanes(kCount);
  if constexpr (std::is_same_v<S, T>) {
    if (count >= kGroup<T> && count < kCount) {
      cover<kGroup<T>>(count, [&](int begin) {
        Vec<T> x[kGroup<T>];
        for (int j = 0; j < kGroup<T>; ++j) x[j] = from[slot[begin + j]].part[p];
        transpose_groups<T>(x);
        for (int lane = 0; lane < lanes; ++lane) {
          const T* group = reinterpret_cast<const T*>(&x[lane % kGroup<T>]) + lane / kGroup<T> * kGroup<T>;
          std::memcpy(base + at.offset(lane) + begin, group, kGroup<T> * sizeof(T));
        }
      });
      return;
    }
  }
  if (count < kCount) {
    T block[kCount][kCount];
    for (int e = 0; e < count; ++e) store(block[e], from[slot[e]].part[p]);
    for (int lane = 0; lane < lanes; ++lane) {
      S* to = base + at.offset(lane);
      for (int e = 0; e < count; ++e) narrow(block[e][lane], to[e]);
    }
    return;
  }
  cover<kCount>(count, [&](int begin) {
    Vec<T> x[kCount];
    for (int j = 0; j < kCount; ++j) x[j] = from[slot[begin + j]].part[p];
    transpose<T>(x);
    for (int lane = 0; lane < lanes; ++lane) store_narrowed(x[lane], base + at.offset(lane) + begin);
  });
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
