// Element types, and vectors of them as wide as the registers of the instruction set.
//
// Kernels work on vectors of R, float or double, whatever elements T lie in memory: `take` widens
// and `put` rounds. Where the compiler has no vector types a vector is one number.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__GNUC__)
#define NORMLAB_MASKS 1 // loads and stores of some lanes only
#else
#define NORMLAB_MASKS 0
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace {

using i64 = std::int64_t;

struct bf16 {
  std::uint16_t bits;
};

template <class T> struct Math { using type = float; };
template <> struct Math<double> { using type = double; };

inline float load(const float *p, i64 i) { return p[i]; }
inline double load(const double *p, i64 i) { return p[i]; }
inline float load(const bf16 *p, i64 i) {
  std::uint32_t wide = std::uint32_t(p[i].bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}
inline void store(float *p, i64 i, float v) { p[i] = v; }
inline void store(double *p, i64 i, double v) { p[i] = v; }
inline void store(bf16 *p, i64 i, float v) {
  std::uint32_t w;
  std::memcpy(&w, &v, 4);
  // Nearest, ties to even. Of a NaN the addition might carry into the sign.
  p[i].bits = std::uint16_t(v == v ? (w + 0x7fffu + ((w >> 16) & 1u)) >> 16 : 0x7fc0u);
}

#if defined(__GNUC__)
#if NORMLAB_MASKS
constexpr int REGISTER = 64;
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
typedef float floats __attribute__((vector_size(REGISTER)));
typedef double doubles __attribute__((vector_size(REGISTER)));
typedef std::uint32_t words __attribute__((vector_size(REGISTER)));
typedef std::uint16_t halves __attribute__((vector_size(REGISTER / 2)));
#else
using floats = float;
using doubles = double;
#endif

template <class R> struct Wide { using type = floats; };
template <> struct Wide<double> { using type = doubles; };
template <class R> using V = typename Wide<R>::type;
template <class R> constexpr i64 LANES = i64(sizeof(V<R>) / sizeof(R));

template <class To, class From> inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class R> inline V<R> all(R v) { return v - V<R>{}; }

template <class R> inline V<R> take(const R *p) {
  V<R> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class R> inline void put(R *p, V<R> v) { std::memcpy(p, &v, sizeof v); }

#if defined(__GNUC__)
inline floats widened(halves h) {
#if NORMLAB_MASKS // compilers convert the two halves apart; unmasked, GCC warns of its own header
  words w = same_bits<words>(_mm512_maskz_cvtepu16_epi32(0xffff, same_bits<__m256i>(h)));
#elif defined(__AVX2__)
  words w = same_bits<words>(_mm256_cvtepu16_epi32(same_bits<__m128i>(h)));
#else
  words w = __builtin_convertvector(h, words);
#endif
  return same_bits<floats>(w << 16);
}
inline halves narrowed(floats v) {
#if defined(__AVX512BF16__)
  return same_bits<halves>(_mm512_cvtneps_pbh(same_bits<__m512>(v))); // subnormal numbers become 0
#else
  words w = same_bits<words>(v);
  words nearest = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v == v ? nearest : words{} + 0x7fc0u, halves);
#endif
}
template <class R> inline V<R> take(const bf16 *p) {
  halves h;
  std::memcpy(&h, p, sizeof h);
  return widened(h);
}
template <class R> inline void put(bf16 *p, floats v) {
  halves h = narrowed(v);
  std::memcpy(p, &h, sizeof h);
}
#else
template <class R> inline float take(const bf16 *p) { return load(p, 0); }
template <class R> inline void put(bf16 *p, float v) { store(p, 0, v); }
#endif

// Asks for the line of memory at p, or for nothing where there is no such memory.
inline void soon(const void *p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

// A vector of elements in memory.
template <class R> struct Whole {
  template <class T> V<R> read(const T *p, V<R>) const { return take<R>(p); }
  template <class T> void write(T *p, V<R> v) const { put<R>(p, v); }
  V<R> live(V<R> v) const { return v; }
};

// The first `count` elements of a vector; the other lanes have the value `rest`.
template <class R> struct Part {
  i64 count;
  template <class T> V<R> read(const T *p, V<R> rest) const {
    R lane[LANES<R>];
    std::memcpy(lane, &rest, sizeof rest);
    for (i64 i = 0; i < count; i++) lane[i] = load(p, i);
    return take<R>(lane);
  }
  template <class T> void write(T *p, V<R> v) const {
    R lane[LANES<R>];
    std::memcpy(lane, &v, sizeof v);
    for (i64 i = 0; i < count; i++) store(p, i, lane[i]);
  }
  // 0 in the other lanes.
  V<R> live(V<R> v) const {
    R lane[LANES<R>] = {};
    std::memcpy(lane, &v, std::size_t(count) * sizeof(R));
    return take<R>(lane);
  }
#if NORMLAB_MASKS
  unsigned mask() const { return (1u << count) - 1; }
  floats read(const float *p, floats rest) const {
    return same_bits<floats>(_mm512_mask_loadu_ps(same_bits<__m512>(rest), mask(), p));
  }
  doubles read(const double *p, doubles rest) const {
    return same_bits<doubles>(_mm512_mask_loadu_pd(same_bits<__m512d>(rest), mask(), p));
  }
  floats read(const bf16 *p, floats rest) const {
    floats v = widened(same_bits<halves>(_mm256_maskz_loadu_epi16(mask(), p)));
    return same_bits<floats>(
        _mm512_mask_mov_ps(same_bits<__m512>(rest), mask(), same_bits<__m512>(v)));
  }
  void write(float *p, floats v) const {
    _mm512_mask_storeu_ps(p, mask(), same_bits<__m512>(v));
  }
  void write(double *p, doubles v) const {
    _mm512_mask_storeu_pd(p, mask(), same_bits<__m512d>(v));
  }
  void write(bf16 *p, floats v) const {
    _mm256_mask_storeu_epi16(p, mask(), same_bits<__m256i>(narrowed(v)));
  }
#endif
};

// f(i, at) for the vectors of n elements, `at` knowing which lanes there are.
template <class R, class F> inline void sweep(i64 n, F f) {
  i64 i = 0;
  for (; i + LANES<R> <= n; i += LANES<R>) f(i, Whole<R>{});
  if (i < n) f(i, Part<R>{n - i});
}

// The sum of all lanes, always in one order.
template <class R> inline double total(V<R> v) {
  constexpr i64 four = LANES<R> < 4 ? LANES<R> : 4;
  R lane[LANES<R>];
  std::memcpy(lane, &v, sizeof v);
  for (i64 i = four; i < LANES<R>; i += four)
    for (i64 j = 0; j < four; j++) lane[j] += lane[i + j];
  double sum = 0;
  for (i64 j = 0; j < four; j++) sum += double(lane[j]);
  return sum;
}
#if defined(__AVX2__) && defined(__GNUC__) // in registers: areas of a few vectors take as many sums
template <> inline double total<float>(floats v) {
  struct Halves { __m128 low, high; };
#if NORMLAB_MASKS
  struct Wide { __m256 low, high; };
  const Wide w = same_bits<Wide>(v);
  const Halves h = same_bits<Halves>(w.low + w.high);
#else
  const Halves h = same_bits<Halves>(v);
#endif
  const __m256d four = _mm256_cvtps_pd(h.low + h.high);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
#endif

} // namespace
