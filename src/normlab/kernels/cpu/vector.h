// Element types, and vectors of them as wide as the registers of the instruction set.
//
// Kernels work on vectors of R, float or double, whatever elements T lie in memory: `take` widens
// and `put` rounds. V<R> is one register, V<T> as many as a register of elements takes: of bf16 two,
// of the elements at even and at odd places, which are widened in one operation each. Where the
// compiler has no vector types a vector is one number.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__GNUC__)
#define NORMLAB_MASKS 1 // loads and stores of some lanes only
#else
#define NORMLAB_MASKS 0
#endif
#if defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define NORMLAB_PAIRS 1 // of a pair of bf16, the first is in the lower half
#else
#define NORMLAB_PAIRS 0
#endif
#if NORMLAB_PAIRS && NORMLAB_MASKS && defined(__AVX512BF16__)
#define NORMLAB_DOTS 1 // bf16 is rounded to, and pairs of it multiplied and added, by one instruction
#else
#define NORMLAB_DOTS 0
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif
#if defined(__GNUC__)
#define INLINED __attribute__((always_inline)) // of lambdas: what they have by reference stays in registers
#else
#define INLINED
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

template <class E> struct Wide { using type = floats; };
template <> struct Wide<double> { using type = doubles; };
#if NORMLAB_PAIRS
struct Two {
  floats even, odd;
};
template <> struct Wide<bf16> { using type = Two; };
template <class X> constexpr bool PAIRED = std::is_same_v<X, Two>;
inline Two operator+(Two a, Two b) { return {a.even + b.even, a.odd + b.odd}; }
inline Two operator-(Two a, Two b) { return {a.even - b.even, a.odd - b.odd}; }
inline Two operator*(Two a, Two b) { return {a.even * b.even, a.odd * b.odd}; }
inline void operator+=(Two &a, Two b) { a.even += b.even, a.odd += b.odd; }
#else
template <class X> constexpr bool PAIRED = false;
#endif
template <class E> using V = typename Wide<E>::type;
template <class E> constexpr i64 LANES = i64(sizeof(V<E>) / sizeof(typename Math<E>::type));

template <class To, class From> inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class E> constexpr int REGISTERS = PAIRED<V<E>> ? 2 : 1;

// f of both registers of a vector that has two, of the vector itself else.
template <class F, class X, class... More> inline auto apart(F f, X x, More... more) {
  if constexpr (PAIRED<X>) return X{f(x.even, more.even...), f(x.odd, more.odd...)};
  else return f(x, more...);
}
// Register number H of a vector.
template <int H, class X> inline auto only(X x) {
  if constexpr (PAIRED<X>) return H ? x.odd : x.even;
  else return x;
}
// The sum of the registers of a vector.
template <class X> inline auto merged(X x) {
  if constexpr (PAIRED<X>) return x.even + x.odd;
  else return x;
}

template <class E, class X> inline V<E> alike(X x) { // registers
  if constexpr (PAIRED<V<E>>) return {x, x};
  else return x;
}
template <class E> inline V<E> all(typename Math<E>::type v) {
  using R = typename Math<E>::type;
  return alike<E>(v - V<R>{});
}

// Index at which number i stands in an array that is taken, and put, a register at a time.
template <class E> constexpr i64 place(i64 i) {
  constexpr i64 lanes = LANES<E>;
  return PAIRED<V<E>> ? i / lanes * lanes + i % lanes / 2 + i % 2 * (lanes / 2) : i;
}
// n numbers, and as many more as fill the last vector.
template <class E> constexpr i64 in_vectors(i64 n) { return (n + LANES<E> - 1) / LANES<E> * LANES<E>; }
// Puts n numbers, of which there are whole vectors, where `place` has them.
template <class E, class R> inline void arrange(R *numbers, i64 n) {
  if constexpr (PAIRED<V<E>>)
    for (i64 from = 0; from < n; from += LANES<E>) {
      R block[LANES<E>], *to = numbers + from;
      std::memcpy(block, to, sizeof block);
      for (i64 i = 0; i < LANES<E> / 2; i++)
        to[i] = block[2 * i], to[LANES<E> / 2 + i] = block[2 * i + 1];
    }
}

// f(0), ..., f(K - 1), each known to the compiler, which then keeps arrays of K in registers.
template <class F, int... I> inline void each_of(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int K, class F> inline void each_of(F f) {
  each_of(std::make_integer_sequence<int, K>{}, f);
}

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
// Rounded to 8 bits, which are the upper half.
inline words nearest(floats v) {
  words w = same_bits<words>(v);
  words nearest = w + 0x7fffu + ((w >> 16) & 1u);
  return v == v ? nearest : words{} + 0x7fc00000u;
}
inline halves narrowed(floats v) {
#if NORMLAB_DOTS
  return same_bits<halves>(_mm512_cvtneps_pbh(same_bits<__m512>(v))); // subnormal numbers become 0
#else
  return __builtin_convertvector(nearest(v) >> 16, halves);
#endif
}
#endif
#if NORMLAB_PAIRS
inline Two widened(words w) {
  return {same_bits<floats>(w << 16), same_bits<floats>(w & 0xffff0000u)};
}
inline words narrowed(Two v) {
#if NORMLAB_DOTS
  alignas(64) static constexpr std::uint16_t in_turn[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh both = _mm512_cvtne2ps_pbh(same_bits<__m512>(v.odd), same_bits<__m512>(v.even));
  return same_bits<words>(
      _mm512_permutexvar_epi16(_mm512_load_si512(in_turn), same_bits<__m512i>(both)));
#else
  return (nearest(v.even) >> 16) | (nearest(v.odd) & 0xffff0000u);
#endif
}

// Two registers in the order of memory, to and from one of even and one of odd places.
struct Halves {
  floats low, high;
};
#if NORMLAB_MASKS
inline floats picked(floats a, floats b, const std::uint32_t *from) {
  return same_bits<floats>(_mm512_permutex2var_ps(
      same_bits<__m512>(a), _mm512_load_si512(from), same_bits<__m512>(b)));
}
inline Two unzipped(Halves h) {
  alignas(64) static constexpr std::uint32_t
      even[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30},
      odd[16] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return {picked(h.low, h.high, even), picked(h.low, h.high, odd)};
}
inline Halves zipped(Two v) {
  alignas(64) static constexpr std::uint32_t
      low[16] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23},
      high[16] = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return {picked(v.even, v.odd, low), picked(v.even, v.odd, high)};
}
#else
inline Two unzipped(Halves h) {
  float lane[LANES<bf16>];
  std::memcpy(lane, &h, sizeof h);
  arrange<bf16>(lane, LANES<bf16>);
  std::memcpy(&h, lane, sizeof h);
  return {h.low, h.high};
}
inline Halves zipped(Two v) {
  float lane[LANES<bf16>], from[LANES<bf16>];
  std::memcpy(from, &v, sizeof v);
  for (i64 i = 0; i < LANES<bf16>; i++) lane[i] = from[place<bf16>(i)];
  Halves h;
  std::memcpy(&h, lane, sizeof h);
  return h;
}
#endif
#endif

template <class E, class T> inline V<E> take(const T *p) {
#if defined(__GNUC__)
  if constexpr (std::is_same_v<T, bf16>) {
    std::conditional_t<PAIRED<V<E>>, words, halves> w;
    std::memcpy(&w, p, sizeof w);
    return widened(w);
  } else if constexpr (PAIRED<V<E>>) { // apart: a compiler keeps what is copied whole in memory
    return {take<T>(p), take<T>(p + LANES<T>)};
  } else {
    V<E> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
#else
  return load(p, 0);
#endif
}
template <class E, class T> inline void put(T *p, V<E> v) {
#if defined(__GNUC__)
  if constexpr (std::is_same_v<T, bf16>) {
    const auto w = narrowed(v);
    std::memcpy(p, &w, sizeof w);
  } else if constexpr (PAIRED<V<E>>) {
    put<T>(p, v.even), put<T>(p + LANES<T>, v.odd);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
#else
  store(p, 0, v);
#endif
}

// Asks for the line of memory at p, or for nothing where there is no such memory.
inline void soon(const void *p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

// A vector of elements in memory.
template <class E> struct Whole {
  template <class T> V<E> read(const T *p, V<E>) const {
#if NORMLAB_PAIRS
    if constexpr (PAIRED<V<E>> && !std::is_same_v<T, bf16>)
      return unzipped({take<T>(p), take<T>(p + LANES<T>)});
#endif
    return take<E>(p);
  }
  template <class T> void write(T *p, V<E> v) const {
#if NORMLAB_PAIRS
    if constexpr (PAIRED<V<E>> && !std::is_same_v<T, bf16>) {
      const Halves h = zipped(v);
      put<T>(p, h.low), put<T>(p + LANES<T>, h.high);
      return;
    }
#endif
    put<E>(p, v);
  }
  V<E> live(V<E> v) const { return v; }
};

// The first `count` elements of a vector; the other lanes have the value `rest`.
template <class E> struct Part {
  using R = typename Math<E>::type;
  i64 count;
  template <class T> V<E> read(const T *p, V<E> rest) const {
    R lane[LANES<E>];
    put<E>(lane, rest);
    for (i64 i = 0; i < count; i++) lane[place<E>(i)] = load(p, i);
    return take<E>(lane);
  }
  template <class T> void write(T *p, V<E> v) const {
    R lane[LANES<E>];
    put<E>(lane, v);
    for (i64 i = 0; i < count; i++) store(p, i, lane[place<E>(i)]);
  }
  // 0 in the other lanes.
  V<E> live(V<E> v) const {
    R lane[LANES<E>], left[LANES<E>] = {};
    put<E>(lane, v);
    for (i64 i = 0; i < count; i++) left[place<E>(i)] = lane[place<E>(i)];
    return take<E>(left);
  }
};
#if NORMLAB_MASKS
inline unsigned lanes_under(i64 count) { return (1u << count) - 1; }
template <> struct Part<float> {
  i64 count;
  floats read(const float *p, floats rest) const {
    return same_bits<floats>(_mm512_mask_loadu_ps(same_bits<__m512>(rest), lanes_under(count), p));
  }
  floats read(const bf16 *p, floats rest) const {
    floats v = widened(same_bits<halves>(_mm256_maskz_loadu_epi16(lanes_under(count), p)));
    return same_bits<floats>(
        _mm512_mask_mov_ps(same_bits<__m512>(rest), lanes_under(count), same_bits<__m512>(v)));
  }
  void write(float *p, floats v) const {
    _mm512_mask_storeu_ps(p, lanes_under(count), same_bits<__m512>(v));
  }
  void write(bf16 *p, floats v) const {
    _mm256_mask_storeu_epi16(p, lanes_under(count), same_bits<__m256i>(narrowed(v)));
  }
  floats live(floats v) const {
    return same_bits<floats>(_mm512_maskz_mov_ps(lanes_under(count), same_bits<__m512>(v)));
  }
};
template <> struct Part<double> {
  i64 count;
  doubles read(const double *p, doubles rest) const {
    return same_bits<doubles>(_mm512_mask_loadu_pd(same_bits<__m512d>(rest), lanes_under(count), p));
  }
  void write(double *p, doubles v) const {
    _mm512_mask_storeu_pd(p, lanes_under(count), same_bits<__m512d>(v));
  }
  doubles live(doubles v) const {
    return same_bits<doubles>(_mm512_maskz_mov_pd(lanes_under(count), same_bits<__m512d>(v)));
  }
};
template <> struct Part<bf16> {
  i64 count;
  Part<float> even() const { return {(count + 1) / 2}; }
  Part<float> odd() const { return {count / 2}; }
  Part<float> low() const { return {std::min(count, LANES<float>)}; }
  Part<float> high() const { return {count - low().count}; }
  Two read(const bf16 *p, Two rest) const {
    const Two v = widened(same_bits<words>(_mm512_maskz_loadu_epi16(lanes_under(count), p)));
    const auto mixed = [](floats v, floats rest, Part<float> at) {
      return same_bits<floats>(
          _mm512_mask_mov_ps(same_bits<__m512>(rest), lanes_under(at.count), same_bits<__m512>(v)));
    };
    return {mixed(v.even, rest.even, even()), mixed(v.odd, rest.odd, odd())};
  }
  Two read(const float *p, Two rest) const {
    const Halves h = zipped(rest);
    return unzipped({low().read(p, h.low), high().read(p + LANES<float>, h.high)});
  }
  void write(bf16 *p, Two v) const {
    _mm512_mask_storeu_epi16(p, lanes_under(count), same_bits<__m512i>(narrowed(v)));
  }
  void write(float *p, Two v) const {
    const Halves h = zipped(v);
    low().write(p, h.low), high().write(p + LANES<float>, h.high);
  }
  Two live(Two v) const { return {even().live(v.even), odd().live(v.odd)}; }
};
#endif

// f(i, at) for the vectors V<E> of n elements, `at` knowing which lanes there are.
template <class E, class F> inline void sweep(i64 n, F f) {
  i64 i = 0;
  for (; i + LANES<E> <= n; i += LANES<E>) f(i, Whole<E>{});
  if (i < n) f(i, Part<E>{n - i});
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
