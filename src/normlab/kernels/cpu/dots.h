// Sums of elements and of their products, those of bf16 by an instruction that takes pairs as they lie
// in memory.

#pragma once

#include "common.h"

namespace {

#if NORMLAB_DOTS
template <class T> constexpr bool DOTTED = std::is_same_v<T, bf16>;

inline floats dot(floats sum, words a, words b) {
  return same_bits<floats>(
      _mm512_dpbf16_ps(same_bits<__m512>(sum), same_bits<__m512bh>(a), same_bits<__m512bh>(b)));
}
// 32 elements, of which those from `count` on are 0.
inline words bits(const bf16 *p, i64 count = 32) {
  return same_bits<words>(_mm512_maskz_loadu_epi16(count < 32 ? (1u << count) - 1 : ~0u, p));
}
// Of two rows, pairs of one above the other, in the order of a vector's registers.
struct Pairs {
  words even, odd;
};
inline Pairs pairs(words upper, words lower) {
  alignas(64) static constexpr std::uint16_t
      even[32] = {0,  32, 2,  34, 4,  36, 6,  38, 8,  40, 10, 42, 12, 44, 14, 46,
                  16, 48, 18, 50, 20, 52, 22, 54, 24, 56, 26, 58, 28, 60, 30, 62},
      odd[32] = {1,  33, 3,  35, 5,  37, 7,  39, 9,  41, 11, 43, 13, 45, 15, 47,
                 17, 49, 19, 51, 21, 53, 23, 55, 25, 57, 27, 59, 29, 61, 31, 63};
  const auto picked = [&](const std::uint16_t *from) {
    return same_bits<words>(_mm512_permutex2var_epi16(
        same_bits<__m512i>(upper), _mm512_load_si512(from), same_bits<__m512i>(lower)));
  };
  return {picked(even), picked(odd)};
}

// Sums of w and w x, or of x and x^2 where w is x. Products of bf16 are exact in float, but those that
// are no normal numbers count as 0, as do factors.
inline void run_dots(const bf16 *x, const bf16 *w, i64 n, float *sums) {
  const words one = words{} + 0x3f803f80u; // two ones
  floats s0 = take<float>(sums), q0 = take<float>(sums + LANES<float>), s1{}, q1{};
  const auto add = [&](words a, words b, floats &s, floats &q) { s = dot(s, b, one), q = dot(q, a, b); };
  constexpr i64 lanes = LANES<bf16>;
  i64 i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    add(bits(x + i), bits(w + i), s0, q0);
    add(bits(x + i + lanes), bits(w + i + lanes), s1, q1);
  }
  for (; i < n; i += lanes) add(bits(x + i, n - i), bits(w + i, n - i), s0, q0);
  put<float>(sums, s0 + s1), put<float>(sums + LANES<float>, q0 + q1);
}

// The same of each column, four rows at a time: more would be streams that no prefetcher follows.
inline void matrix_dots(const bf16 *x, i64 xp, const bf16 *w, i64 wp, i64 rows, i64 c, float *s0,
                        float *s1) {
  const words one = words{} + 0x3f803f80u;
  const bool same = w == x && wp == xp;
  constexpr i64 ahead = (16 << 10) / i64(sizeof(bf16));
  for (i64 r = 0; r < rows; r += 4) {
    const i64 count = std::min<i64>(4, rows - r);
    for (i64 j = 0; j < c; j += LANES<bf16>) {
      const i64 live = c - j;
      Two s = take<bf16>(s0 + j), q = take<bf16>(s1 + j);
      for (i64 i = r; i < r + count; i += 2) {
        const i64 other = i + 1 < r + count ? live : 0; // no row, or one more
        const bf16 *a = x + i * xp + j, *b = w + i * wp + j;
        soon(a + ahead), soon(a + xp + ahead);
        if (!same) soon(b + ahead), soon(b + wp + ahead);
        const Pairs v = pairs(bits(a, live), bits(a + xp, other));
        const Pairs u = same ? v : pairs(bits(b, live), bits(b + wp, other));
        s = {dot(s.even, u.even, one), dot(s.odd, u.odd, one)};
        q = {dot(q.even, u.even, v.even), dot(q.odd, u.odd, v.odd)};
      }
      put<bf16>(s0 + j, s), put<bf16>(s1 + j, q);
    }
  }
}
#else
template <class T> constexpr bool DOTTED = false;
#endif

// The number about which moments are first taken: an element, or 0 where products of pairs serve, and
// squares do not overflow.
template <class T> inline auto first_origin(const T *x, i64 at) {
  const auto element = load(x, at);
  return DOTTED<T> && std::fabs(element) < 0x1p50f ? 0 : element;
}
// Whether squares, of which products of pairs may have lost some, are so small that they are taken
// again; and about what, then: any number but 0.
template <class T> inline bool lost(double sum, double squares, double count) {
  return DOTTED<T> && squares < count * 0x1p-100 && (squares != 0 || sum != 0);
}
template <class R> inline R next_origin(double mean) {
  return R(mean) != R(0) ? R(mean) : std::numeric_limits<R>::min();
}

// Sums of z and z^2, z = x - shift.
template <class T, class R> inline void run_moments(const T *x, i64 n, R shift, R *sums) {
  if constexpr (DOTTED<T>)
    if (shift == 0) return run_dots(x, x, n, sums);
  const V<T> k = all<T>(shift);
  V<T> s0{}, q0{}, s1{}, q1{};
  i64 i = 0;
  for (; i + 2 * LANES<T> <= n; i += 2 * LANES<T>) {
    V<T> z = take<T>(x + i) - k, w = take<T>(x + i + LANES<T>) - k;
    s0 += z, q0 += z * z;
    s1 += w, q1 += w * w;
  }
  sweep<T>(n - i, [&](i64 j, auto at) {
    V<T> z = at.read(x + i + j, k) - k;
    s0 += z, q0 += z * z;
  });
  put<R>(sums, take<R>(sums) + merged(s0 + s1));
  put<R>(sums + LANES<R>, take<R>(sums + LANES<R>) + merged(q0 + q1));
}

} // namespace
