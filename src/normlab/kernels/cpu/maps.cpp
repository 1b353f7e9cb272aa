// One curve for each map (sample, channel) of a tensor, and the gradient.
//
// Methods whose statistics are functions of the moments of single maps are these curves between
// functions of a few N x C numbers, which are in middles.h or which the caller differentiates: see
// maps.py. Beside the coefficients of its curve, a map has its mean mu, and in the gradient k and h,
// which hold what flows through its moments:
//   y = f(x; coefficients),  dx = dy f'(x) + (x - mu) k + h.
// Orders of memory are those of normalize.cpp. Sums over a map are partial sums in R, in double from
// there on, in an order that depends on the shape alone.

#include <utility>

#include "middles.h"
#include "stream.h"

namespace {

// The numbers of a map, alike in all lanes, or of the maps of a vector of channels.
template <class X> struct Coefficients {
  X mu, a, b, v, d, s;
};

// Curves. `terms` leaves what one element, with g = dL/dy, adds to each coefficient's sum, and
// `finish` makes the coefficients' gradients of the sums of a map; `through` is dy f'(x). X is a
// vector of elements.

// y = (x - mu) a + b
struct Line {
  static constexpr int coefficients = 2;
  template <class X> static X value(X x, const Coefficients<X> &q) { return (x - q.mu) * q.a + q.b; }
  template <class X> static void terms(X x, X g, const Coefficients<X> &q, X *to) {
    to[0] = g * (x - q.mu), to[1] = g;
  }
  static void finish(double *, i64, double, double) {}
  template <class X> static X through(X, X g, const Coefficients<X> &q) { return g * q.a; }
};

// y = x / max(d, v x + s) a + b; a tie belongs half to each side, and NaN wins, as torch has it
struct Larger {
  static constexpr int coefficients = 5;
  // Comparisons are false of NaN; one in d is in s too, see `gathered`.
  template <class X> static X larger(X line, X d) { return d > line ? d : line; }
  // The part of z, which is finite, that goes to the line.
  template <class X> static X share(X z, X line, X d) {
    const X zero{};
    z = line < d ? zero : z;
    return line == d ? z * 0.5f : z;
  }
  template <class X> static X value(X x, const Coefficients<X> &q) {
    return x / larger<X>(q.v * x + q.s, q.d) * q.a + q.b;
  }
  template <class X> static void terms(X x, X g, const Coefficients<X> &q, X *to) {
    X line = q.v * x + q.s, inverse = 1.0f / larger<X>(line, q.d), ratio = x * inverse;
    X both = g * ratio, over = share<X>(both, line, q.d);
    to[0] = both, to[1] = g, to[2] = over * ratio, to[3] = both - over, to[4] = over * inverse;
  }
  // dL/dmax is -a g x / max^2; where d is the larger, it is the same of all elements.
  static void finish(double *sums, i64 step, double a, double d) {
    sums[2 * step] *= -a, sums[4 * step] *= -a;
    if (sums[3 * step] != 0) sums[3 * step] *= -a / d;
  }
  template <class X> static X through(X x, X g, const Coefficients<X> &q) {
    X line = q.v * x + q.s, inverse = 1.0f / larger<X>(line, q.d), direct = g * (q.a * inverse);
    return direct - direct * share<X>(x * inverse * q.v, line, q.d);
  }
};

// One record for all passes; kept in step with kernels/cpu/maps.py.
struct Maps {
  i64 n, c, p;
  i64 xn, xc, xp, gn, gc, gp, yn, yc, yp; // strides of x, of dy, and of y or dx
  i64 columns, curve;
  const void *x, *dy, *mean, *k, *h; // mean, k and h: one number each a map, sample by sample
  const void *a, *b, *v, *d, *s;     // as many, of those coefficients that the curve has
  void *out, *sums;                  // y or dx; coefficients x N x C, in the order above
};

// Elements from one sample, channel and position to the next.
struct Strides {
  i64 n, c, p;
};

// The numbers of the maps from one on.
template <class R> struct Numbers {
  const R *mean, *k, *h, *a, *b, *v, *d, *s;
};

template <class T, class R> struct Job {
  i64 n, c, p;
  Strides xs, gs, ys;
  const T *x, *dy;
  T *out;
  R *sums;
  Numbers<R> all;
  Numbers<R> from(i64 map) const {
    return {all.mean + map, all.k + map, all.h + map, all.a + map,
            all.b + map,    all.v + map, all.d + map, all.s + map};
  }
};

// The coefficients of the vector of maps that `at` reads from map j on, or of map j for all lanes.
template <class F, class R, class Read>
inline Coefficients<V<R>> gathered(const Numbers<R> &of, Read read) {
  constexpr int K = F::coefficients;
  const V<R> zero{};
  if (K == 2) return {read(of.mean), read(of.a), read(of.b), zero, zero, zero};
  const V<R> d = read(of.d), s = read(of.s);
  return {read(of.mean), read(of.a), read(of.b), read(of.v), d, d == d ? s : d};
}
template <class F, class R> inline Coefficients<V<R>> of_map(const Numbers<R> &of) {
  return gathered<F>(of, [](const R *q) { return all<R>(*q); });
}
template <class F, class R, class At>
inline Coefficients<V<R>> of_channels(const Numbers<R> &of, i64 j, At at) {
  return gathered<F>(of, [&](const R *q) { return at.read(q + j, V<R>{}); });
}

// f(0), ..., f(K - 1), each known to the compiler, which then keeps arrays of K in registers.
template <class F, int... I> inline void each_of(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int K, class F> inline void each_of(F f) {
  each_of(std::make_integer_sequence<int, K>{}, f);
}

constexpr i64 CHUNK = 4096; // elements of a row, and
constexpr i64 STEP = 128;   // rows of a column, that are summed in R before sums go to double

// --- rows: a map is P contiguous elements ----------------------------------------------------------

template <class F, class T, class R>
void apply_row(const T *x, T *y, i64 p, const Numbers<R> &of, Out &out) {
  const Coefficients<V<R>> q = of_map<F>(of);
  out.sweep_to<R>(y, p, [&](i64 i, auto at) {
    at.write(y + i, F::value(at.read(x + i, V<R>{}), q));
  });
}

// Adds to `sums`.
template <class F, class T, class R>
void sum_row(const T *x, const T *dy, i64 p, const Numbers<R> &of, double *sums) {
  constexpr int K = F::coefficients;
  const Coefficients<V<R>> q = of_map<F>(of);
  for (i64 first = 0; first < p; first += CHUNK) {
    const i64 last = std::min(first + CHUNK, p);
    V<R> s[K] = {}, one[K];
    i64 i = first; // not by `sweep`: sums that a function has by reference are kept in memory
    for (; i + LANES<R> <= last; i += LANES<R>) {
      F::terms(take<R>(x + i), take<R>(dy + i), q, one);
      each_of<K>([&](auto j) { s[j] += one[j]; });
    }
    if (i < last) {
      const Part<R> at{last - i};
      const V<R> zero{};
      F::terms(at.read(x + i, zero), at.read(dy + i, zero), q, one);
      each_of<K>([&](auto j) { s[j] += at.live(one[j]); });
    }
    each_of<K>([&](auto j) { sums[j] += total<R>(s[j]); });
  }
  F::finish(sums, 1, double(of.a[0]), double(of.d[0]));
}

// What flows through the moments; where nothing does, what x holds does not matter, be it NaN.
template <class X> inline X of_moments(X x, X mu, X k, X h) {
  const X zero{};
  return (k != zero ? (x - mu) * k : zero) + h;
}

template <class F, class T, class R>
void gradient_row(const T *x, const T *dy, T *dx, i64 p, const Numbers<R> &of, Out &out) {
  const Coefficients<V<R>> q = of_map<F>(of);
  const V<R> k = all<R>(of.k[0]), h = all<R>(of.h[0]);
  out.sweep_to<R>(dx, p, [&](i64 i, auto at) {
    V<R> e = at.read(x + i, V<R>{});
    V<R> direct = F::through(e, at.read(dy + i, V<R>{}), q);
    at.write(dx + i, direct + of_moments<V<R>>(e, q.mu, k, h));
  });
}

// --- columns: a sample is P rows of C contiguous channels ------------------------------------------

constexpr i64 SHORT = 256; // bytes of rows that are taken together: more is read of each channel here

template <class F, class T, class R>
void apply_columns(const T *x, i64 xp, T *y, i64 yp, i64 rows, i64 c, const Numbers<R> &of,
                   Out &out) {
  row_by_row<T>(rows, c, [&](i64 r, auto count) {
    out.sweep_to<R>(y + r * yp, c, [&](i64 j, auto at) {
      const Coefficients<V<R>> q = of_channels<F>(of, j, at);
      for (i64 i = r; i < r + count; i++)
        at.write(y + i * yp + j, F::value(at.read(x + i * xp + j, V<R>{}), q));
    });
  }, SHORT);
}

// Adds to `sums`, C for each coefficient, by way of as many in `work`.
template <class F, class T, class R>
void sum_columns(const T *x, i64 xp, const T *dy, i64 gp, i64 rows, i64 c, const Numbers<R> &of,
                 double *sums, R *work) {
  constexpr int K = F::coefficients;
  for (i64 first = 0; first < rows; first += STEP) {
    i64 last = std::min(first + STEP, rows);
    std::fill(work, work + K * c, R(0));
    row_by_row<T>(last - first, c, [&](i64 r, auto count) {
      sweep<R>(c, [&](i64 j, auto at) {
        const Coefficients<V<R>> q = of_channels<F>(of, j, at);
        const V<R> zero{};
        V<R> one[K], s[K];
        each_of<K>([&](auto k) { s[k] = at.read(work + k * c + j, zero); });
        for (i64 i = first + r; i < first + r + count; i++) {
          F::terms(at.read(x + i * xp + j, zero), at.read(dy + i * gp + j, zero), q, one);
          each_of<K>([&](auto k) { s[k] += one[k]; });
        }
        each_of<K>([&](auto k) { at.write(work + k * c + j, s[k]); });
      });
    }, SHORT);
    for (i64 j = 0; j < K * c; j++) sums[j] += double(work[j]);
  }
}

template <class F, class T, class R>
void gradient_columns(const T *x, i64 xp, const T *dy, i64 gp, T *dx, i64 yp, i64 rows, i64 c,
                      const Numbers<R> &of, Out &out) {
  row_by_row<T>(rows, c, [&](i64 r, auto count) {
    out.sweep_to<R>(dx + r * yp, c, [&](i64 j, auto at) {
      const Coefficients<V<R>> q = of_channels<F>(of, j, at);
      const V<R> k = at.read(of.k + j, V<R>{}), h = at.read(of.h + j, V<R>{});
      for (i64 i = r; i < r + count; i++) {
        V<R> e = at.read(x + i * xp + j, V<R>{});
        V<R> direct = F::through(e, at.read(dy + i * gp + j, V<R>{}), q);
        at.write(dx + i * yp + j, direct + of_moments<V<R>>(e, q.mu, k, h));
      }
    });
  }, SHORT);
}

// --- passes ----------------------------------------------------------------------------------------

// Whether a result is stored past the caches: where it is larger than what they hold, and rows follow
// each other, or columns have whole lines of memory.
template <class T, class R> bool streamed(const Job<T, R> &job, bool columns) {
  if (!past_caches(job.out, job.n * job.c * job.p)) return false;
  return columns ? whole_lines(job.out, job.ys.n | job.ys.p | job.c) : job.ys.c == job.p;
}

// Calls f(sample, channel, out) for every map.
template <class T, class R, class Call> void each_row(const Job<T, R> &job, Call f) {
  share_out(job.n * job.c, streamed(job, false),
            [&](i64 map, Out &out) { f(map / job.c, map % job.c, out); });
}

// Parts of a sample in columns, so that threads have work where samples are few.
template <class T, class R> i64 parts_of(const Job<T, R> &job) {
  return std::max<i64>(1, std::min<i64>(64 / std::max<i64>(1, job.n), job.p / 64));
}

// Calls f(sample, number of the part, first position, positions, out) for all parts of all samples.
template <class T, class R, class Call> void each_part(const Job<T, R> &job, Call f) {
  const i64 parts = parts_of(job);
  share_out(job.n * parts, streamed(job, true), [&](i64 unit, Out &out) {
    i64 n = unit / parts, i = unit % parts, first = job.p * i / parts;
    f(n, unit, first, job.p * (i + 1) / parts - first, out);
  });
}

template <class F, class T, class R> void apply(const Job<T, R> &job, bool columns) {
  const Strides &xs = job.xs, &ys = job.ys;
  if (columns)
    each_part(job, [&](i64 n, i64, i64 p, i64 rows, Out &out) {
      apply_columns<F>(job.x + n * xs.n + p * xs.p, xs.p, job.out + n * ys.n + p * ys.p, ys.p, rows,
                       job.c, job.from(n * job.c), out);
    });
  else
    each_row(job, [&](i64 n, i64 c, Out &out) {
      apply_row<F>(job.x + n * xs.n + c * xs.c, job.out + n * ys.n + c * ys.c, job.p,
                   job.from(n * job.c + c), out);
    });
}

template <class F, class T, class R> void sum(const Job<T, R> &job, bool columns) {
  constexpr int K = F::coefficients;
  const Strides &xs = job.xs, &gs = job.gs;
  if (!columns)
    return each_row(job, [&](i64 n, i64 c, Out &) {
      double totals[5] = {};
      i64 map = n * job.c + c;
      sum_row<F>(job.x + n * xs.n + c * xs.c, job.dy + n * gs.n + c * gs.c, job.p, job.from(map),
                 totals);
      for (int j = 0; j < K; j++) job.sums[j * job.n * job.c + map] = R(totals[j]);
    });
  i64 parts = parts_of(job), width = K * job.c;
  std::vector<double> totals(job.n * parts * width);
  std::vector<R> work(job.n * parts * width);
  each_part(job, [&](i64 n, i64 unit, i64 p, i64 rows, Out &) {
    sum_columns<F>(job.x + n * xs.n + p * xs.p, xs.p, job.dy + n * gs.n + p * gs.p, gs.p, rows,
                   job.c, job.from(n * job.c), totals.data() + unit * width,
                   work.data() + unit * width);
  });
  for (i64 n = 0; n < job.n; n++) {
    double *all = totals.data() + n * parts * width;
    for (i64 i = 1; i < parts; i++)
      for (i64 j = 0; j < width; j++) all[j] += all[i * width + j];
    const Numbers<R> of = job.from(n * job.c);
    for (i64 c = 0; c < job.c; c++) F::finish(all + c, job.c, double(of.a[c]), double(of.d[c]));
    for (int k = 0; k < K; k++)
      for (i64 c = 0; c < job.c; c++) job.sums[(k * job.n + n) * job.c + c] = R(all[k * job.c + c]);
  }
}

template <class F, class T, class R> void gradient(const Job<T, R> &job, bool columns) {
  const Strides &xs = job.xs, &gs = job.gs, &ys = job.ys;
  if (columns)
    each_part(job, [&](i64 n, i64, i64 p, i64 rows, Out &out) {
      gradient_columns<F>(job.x + n * xs.n + p * xs.p, xs.p, job.dy + n * gs.n + p * gs.p, gs.p,
                          job.out + n * ys.n + p * ys.p, ys.p, rows, job.c, job.from(n * job.c),
                          out);
    });
  else
    each_row(job, [&](i64 n, i64 c, Out &out) {
      gradient_row<F>(job.x + n * xs.n + c * xs.c, job.dy + n * gs.n + c * gs.c,
                      job.out + n * ys.n + c * ys.c, job.p, job.from(n * job.c + c), out);
    });
}

enum Pass { APPLY = 0, SUMS = 1, GRADIENT = 2 };

template <class F, class T> int pass(const Maps &m, int which) {
  using R = typename Math<T>::type;
  // What the pass does not read may be absent; its address is moved along all the same.
  auto r = [&](const void *q) { return static_cast<const R *>(q ? q : m.mean); };
  Job<T, R> job{m.n, m.c, m.p, {m.xn, m.xc, m.xp}, {m.gn, m.gc, m.gp}, {m.yn, m.yc, m.yp},
                static_cast<const T *>(m.x), static_cast<const T *>(m.dy),
                static_cast<T *>(m.out), static_cast<R *>(m.sums),
                {r(m.mean), r(m.k), r(m.h), r(m.a), r(m.b), r(m.v), r(m.d), r(m.s)}};
  if (which == APPLY) apply<F>(job, m.columns);
  else if (which == SUMS) sum<F>(job, m.columns);
  else if (which == GRADIENT) gradient<F>(job, m.columns);
  else return 1;
  return 0;
}

template <class T> int choose(const Maps &m, int which) {
  switch (m.curve) {
  case 0: return pass<Line, T>(m, which);
  case 1: return pass<Larger, T>(m, which);
  default: return 1;
  }
}

// All of a direction but the moments of maps: the middle `M` and the passes about it.
template <class F, template <class> class M, class T> int whole(const Middle &m, Maps maps, bool back) {
  using R = typename Math<T>::type;
  constexpr i64 K = M<R>::coefficients;
  const i64 all = maps.n * maps.c;
  M<R> middle(m, maps.n, maps.c);
  std::vector<R> room(std::size_t((back ? 2 * K + 2 : K) * all));
  R *of = room.data(), *sums = of + K * all, *k = sums + K * all, *h = k + all;
  middle.fill(of);
  maps.mean = m.mean, maps.a = of, maps.b = of + all;
  if (K == 5) maps.v = of + 2 * all, maps.d = of + 3 * all, maps.s = of + 4 * all;
  if (!back) return pass<F, T>(maps, APPLY);
  maps.sums = sums;
  pass<F, T>(maps, SUMS);
  middle.pull(sums, of, maps.p, k, h);
  maps.k = k, maps.h = h;
  return maps.out ? pass<F, T>(maps, GRADIENT) : 0;
}

} // namespace

// pass: 0 y, 1 sums, 2 dx. Returns 0, or 1 for another pass, curve or dtype, 2
// without memory.
EXPORT int normlab_maps(const Maps *maps, int pass, int dtype) noexcept {
  return typed(dtype, [&](auto element) { return choose<decltype(element)>(*maps, pass); });
}

// A direction of a layer whose middle is known here: of `maps`, the lengths, walks, curve, x, dy, and y
// or dx. Returns 0, or 1 for another curve or dtype, 2 without memory.
EXPORT int normlab_middle(const Middle *middle, const Maps *maps, int back, int dtype) noexcept {
  return typed(dtype, [&](auto element) {
    using T = decltype(element);
    if (maps->curve == 0) return whole<Line, Mixture, T>(*middle, *maps, back);
    if (maps->curve == 1) return whole<Larger, Wider, T>(*middle, *maps, back);
    return 1;
  });
}
