// Results that no cache will hold until they are read, stored past the caches: memory is then not
// read before it is written, and what was read stays near for the pass after.
//
// Only whole lines of memory go that way. One that a run begins and the next run ends is put together
// apart, since a line stored in two ways takes longer than either.

#pragma once

#include <atomic>

#include "common.h"

// Bytes of a result from which it is stored past the caches, one number for all source files: half of
// what caches of some 32 MB have left beside the tensor that is read.
inline std::atomic<std::int64_t> normlab_streamed{8 << 20};

namespace {

constexpr i64 LINE = 64; // bytes

#if defined(__x86_64__) && defined(__GNUC__)
constexpr bool STREAMS = true;
template <class X> inline void stream(void *to, X v) {
  if constexpr (sizeof(X) == 8)
    _mm_stream_si64(static_cast<long long *>(to), same_bits<long long>(v));
  else if constexpr (sizeof(X) == 16)
    _mm_stream_si128(static_cast<__m128i *>(to), same_bits<__m128i>(v));
#if defined(__AVX2__)
  else if constexpr (sizeof(X) == 32)
    _mm256_stream_si256(static_cast<__m256i *>(to), same_bits<__m256i>(v));
#endif
#if NORMLAB_MASKS
  else
    _mm512_stream_si512(static_cast<__m512i *>(to), same_bits<__m512i>(v));
#endif
}
inline void streamed() { _mm_sfence(); }
#else
constexpr bool STREAMS = false;
template <class X> inline void stream(void *, X) {}
inline void streamed() {}
#endif

// A vector of elements at a place of its own size.
template <class E> struct Past : Whole<E> {
  template <class T> void write(T *p, V<E> v) const {
    if constexpr (STREAMS && std::is_same_v<T, bf16>) stream(p, narrowed(v));
    else stream(p, v);
  }
};

// The first elements of a vector, in a line that is put together so many bytes away.
template <class E> struct Begun : Part<E> {
  std::ptrdiff_t away;
  Begun(i64 count, std::ptrdiff_t bytes) : Part<E>{count}, away(bytes) {}
  template <class T> void write(T *p, V<E> v) const {
    Part<E>::write(reinterpret_cast<T *>(reinterpret_cast<std::uintptr_t>(p) + away), v);
  }
};

// Where a thread stores runs; all is stored when this ends.
class Out {
  const bool past;
  std::uintptr_t line = 0; // that was begun, of which `room` has the bytes from .. to
  i64 from = 0, to = 0;
  alignas(LINE) unsigned char room[LINE] = {};

  // f for the elements i .. end of one line, into `room`
  template <class E, class T, class F> void begin(T *y, i64 i, i64 end, F &f) {
    const auto first = reinterpret_cast<std::uintptr_t>(y + i);
    const i64 off = i64(first % LINE);
    if (first - off != line || to != off) close(), line = first - off, from = off;
    to = off + (end - i) * i64(sizeof(T));
    const auto away = std::ptrdiff_t(reinterpret_cast<std::uintptr_t>(room) - line);
    for (; i < end; i += LANES<E>) f(i, Begun<E>(std::min(end - i, LANES<E>), away));
    if (to == LINE) close();
  }
  void close() {
    if (!line) return;
    unsigned char *memory = reinterpret_cast<unsigned char *>(line);
    if (from == 0 && to == LINE)
      for (i64 i = 0; i < LINE; i += 8) {
        i64 bits;
        std::memcpy(&bits, room + i, sizeof bits);
        stream(memory + i, bits);
      }
    else
      std::memcpy(memory + from, room + from, std::size_t(to - from));
    line = 0;
  }

public:
  explicit Out(bool streams) : past(STREAMS && streams) {}
  Out(const Out &) = delete;
  ~Out() {
    if (!past) return;
    close();
    streamed();
  }

  // f(i, at) for the vectors of n elements, as `sweep` has it; f writes to y + i and nowhere else.
  template <class E, class T, class F> void sweep_to(T *y, i64 n, F f) {
    if constexpr (sizeof(typename Math<E>::type) == 4) { // few have doubles, and kernels are many
      constexpr i64 whole = LINE / i64(sizeof(T));
      const i64 off = i64(reinterpret_cast<std::uintptr_t>(y) % LINE) / i64(sizeof(T));
      i64 i = 0;
      if (past) {
        if (off) begin<E>(y, 0, i = std::min(n, whole - off), f);
        for (; i + whole <= n; i += whole)
          for (i64 j = 0; j < whole; j += LANES<E>) f(i + j, Past<E>{});
        if (i < n) begin<E>(y, i, n, f);
        return;
      }
    }
    sweep<E>(n, f);
  }
};

// Whether so many elements of a result are more than caches hold until it is read.
template <class T> bool past_caches(const T *result, i64 elements) {
  return result && elements * i64(sizeof(T)) >= normlab_streamed;
}

// Whether runs at these strides, or sums of them by bits, have whole lines of memory.
template <class T> bool whole_lines(const T *result, i64 strides) {
  return reinterpret_cast<std::uintptr_t>(result) % LINE == 0 && strides * i64(sizeof(T)) % LINE == 0;
}

// body(i, out) for all under `count`, shared out among threads.
template <class F> void share_out(i64 count, bool streams, const F &body) {
  share_ranges(count, [&](i64 from, i64 to) {
    Out out(streams);
    for (i64 i = from; i < to; i++) body(i, out);
  });
}

} // namespace
