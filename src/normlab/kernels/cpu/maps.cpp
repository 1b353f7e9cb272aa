// One curve for each map (sample, channel) of a tensor, and the gradient.
//
// Methods whose statistics are functions of the moments of single maps are these curves between
// functions of a few N x C numbers, which are in middles.h or which the caller differentiates: see
// maps.py. Beside the coefficients of its curve, a map has its mean mu, and in the gradient k and h,
// which hold what flows through its moments:
//   y = f(x; coefficients),  dx = dy f'(x) + (x - mu) k + h.
// Orders of memory are those of normalize.cpp. Sums over a map are partial sums in R, in double from
// there on, in an order that depends on the shape alone.

#include "middles.h"
#include "stream.h"

namespace {

// The numbers of a map, alike in all lanes, or of the maps of a vector of channels.
template <class X> struct Coefficients {
  X mu, a, b, v, d, s;
};

// Curves. `terms` leaves what one element, with g = dL/dy, adds to each coefficient's sum, and
// `finish` makes the coefficients' gradients of the sums of a map; `through` is dy f'(x). X is a
// register of elements.

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

// The coefficients of the maps that `read` takes a vector of.
template <class F, class T, class R, class Read>
inline Coefficients<V<T>> gathered(const Numbers<R> &of, Read read) {
  constexpr int K = F::coefficients;
  const V<T> zero{};
  if (K == 2) return {read(of.mean), read(of.a), read(of.b), zero, zero, zero};
  const auto wanting = [](auto d, auto s) { return d == d ? s : d; };
  const V<T> d = read(of.d), s = read(of.s);
  return {read(of.mean), read(of.a), read(of.b), read(of.v), d, apart(wanting, d, s)};
}
// Those of one map, alike in all lanes; and those of a vector of channels.
template <class F, class T, class R> inline Coefficients<V<T>> of_map(const Numbers<R> &of) {
  return gathered<F, T>(of, [](const R *q) { return all<T>(*q); });
}
template <class F, class T, class R>
inline Coefficients<V<T>> of_channels(const Numbers<R> &of, i64 j) {
  return gathered<F, T>(of, [&](const R *q) { return take<T>(q + j); });
}

// Coefficients of one register of a vector, and curves of all.
template <int H, class X> inline auto only(const Coefficients<X> &q) {
  return Coefficients<decltype(only<H>(q.a))>{only<H>(q.mu), only<H>(q.a), only<H>(q.b),
                                              only<H>(q.v),  only<H>(q.d), only<H>(q.s)};
}
template <class F, class X> inline X value_of(X x, const Coefficients<X> &q) {
  if constexpr (PAIRED<X>) return {F::value(x.even, only<0>(q)), F::value(x.odd, only<1>(q))};
  else return F::value(x, q);
}
template <class F, class X> inline X through_of(X x, X g, const Coefficients<X> &q) {
  if constexpr (PAIRED<X>)
    return {F::through(x.even, g.even, only<0>(q)), F::through(x.odd, g.odd, only<1>(q))};
  else return F::through(x, g, q);
}

// Numbers that there are for each channel, one kind after the other, in whole vectors.
constexpr i64 KINDS = 8;
template <class F, class T, class R> Numbers<R> arranged(const Numbers<R> &of, i64 c, R *room) {
  const i64 width = in_vectors<T>(c);
  const auto copy = [&](const R *from, i64 i) {
    R *to = room + i * width;
    std::copy(from, from + c, to);
    std::fill(to + c, to + width, R(0));
    arrange<T>(to, width);
    return to;
  };
  const Numbers<R> line{copy(of.mean, 0), copy(of.k, 1), copy(of.h, 2), copy(of.a, 3), copy(of.b, 4),
                        of.v, of.d, of.s};
  if (F::coefficients == 2) return line;
  return {line.mean, line.k, line.h, line.a, line.b, copy(of.v, 5), copy(of.d, 6), copy(of.s, 7)};
}

constexpr i64 CHUNK = 4096; // elements of a row, and
constexpr i64 STEP = 128;   // rows of a column, that are summed in R before sums go to double

// --- rows: a map is P contiguous elements ----------------------------------------------------------

template <class F, class T, class R>
void apply_row(const T *x, T *y, i64 p, const Numbers<R> &of, Out &out) {
  const Coefficients<V<T>> q = of_map<F, T>(of);
  out.sweep_to<T>(y, p, [&](i64 i, auto at) {
    at.write(y + i, value_of<F>(at.read(x + i, V<T>{}), q));
  });
}

// Adds to `sums`.
template <class F, class T, class R>
void sum_row(const T *x, const T *dy, i64 p, const Numbers<R> &of, double *sums) {
  constexpr int K = F::coefficients;
  const Coefficients<V<R>> q = of_map<F, R>(of);
  for (i64 first = 0; first < p; first += CHUNK) {
    const i64 last = std::min(first + CHUNK, p);
    V<R> s[K] = {}, one[K];
    i64 i = first; // not by `sweep`: sums that a function has by reference are kept in memory
    for (; i + LANES<T> <= last; i += LANES<T>) {
      const V<T> e = take<T>(x + i), g = take<T>(dy + i);
      each_of<REGISTERS<T>>([&](auto h) {
        F::terms(only<h>(e), only<h>(g), q, one);
        each_of<K>([&](auto j) { s[j] += one[j]; });
      });
    }
    if (i < last) {
      const Part<T> at{last - i};
      const V<T> e = at.read(x + i, V<T>{}), g = at.read(dy + i, V<T>{}), live = at.live(all<T>(1));
      each_of<REGISTERS<T>>([&](auto h) {
        F::terms(only<h>(e), only<h>(g), q, one);
        each_of<K>([&](auto j) { s[j] += only<h>(live) != V<R>{} ? one[j] : V<R>{}; });
      });
    }
    each_of<K>([&](auto j) { sums[j] += total<R>(s[j]); });
  }
  F::finish(sums, 1, double(of.a[0]), double(of.d[0]));
}

// dx, with what flows through the moments.
template <class F, class X>
inline X gradient_of(X x, X g, const Coefficients<X> &q, X minus_k, X h) {
  return through_of<F>(x, g, q) + less_through(h, x - q.mu, minus_k);
}

template <class F, class T, class R>
void gradient_row(const T *x, const T *dy, T *dx, i64 p, const Numbers<R> &of, Out &out) {
  const Coefficients<V<T>> q = of_map<F, T>(of);
  const V<T> k = all<T>(-of.k[0]), h = all<T>(of.h[0]);
  out.sweep_to<T>(dx, p, [&](i64 i, auto at) {
    const V<T> e = at.read(x + i, V<T>{}), g = at.read(dy + i, V<T>{});
    at.write(dx + i, gradient_of<F>(e, g, q, k, h));
  });
}

// --- columns: a sample is P rows of C contiguous channels ------------------------------------------

constexpr i64 SHORT = 256; // bytes of rows that are taken together: more is read of each channel here

template <class F, class T, class R>
void apply_columns(const T *x, i64 xp, T *y, i64 yp, i64 rows, i64 c, const Numbers<R> &of,
                   Out &out) {
  row_by_row<T>(rows, c, [&](i64 r, auto count) {
    out.sweep_to<T>(y + r * yp, c, [&](i64 j, auto at) {
      const Coefficients<V<T>> q = of_channels<F, T>(of, j);
      for (i64 i = r; i < r + count; i++)
        at.write(y + i * yp + j, value_of<F>(at.read(x + i * xp + j, V<T>{}), q));
    });
  }, SHORT);
}

// Adds to `sums`, C for each coefficient, by way of whole vectors in `work`.
template <class F, class T, class R>
void sum_columns(const T *x, i64 xp, const T *dy, i64 gp, i64 rows, i64 c, const Numbers<R> &of,
                 double *sums, R *work) {
  constexpr int K = F::coefficients;
  for (i64 first = 0; first < rows; first += STEP) {
    i64 last = std::min(first + STEP, rows);
    const i64 width = in_vectors<T>(c);
    std::fill(work, work + K * width, R(0));
    tile_by_tile<T>(last - first, c, [&](i64 r, i64 count) {
      sweep<T>(c, [&](i64 j, auto at) {
        each_of<REGISTERS<T>>([&](auto h) { // apart, since sums and coefficients fill all that there are
          const Coefficients<V<R>> q = only<h>(of_channels<F, T>(of, j));
          R *to = work + j + h * LANES<R>;
          V<R> one[K], s[K];
          each_of<K>([&](auto k) { s[k] = take<R>(to + k * width); });
          for (i64 i = first + r; i < first + r + count; i++) {
            if (h == 0) soon(x + (i + count) * xp + j), soon(dy + (i + count) * gp + j);
            const V<T> e = at.read(x + i * xp + j, V<T>{}), g = at.read(dy + i * gp + j, V<T>{});
            F::terms(only<h>(e), only<h>(g), q, one);
            each_of<K>([&](auto k) { s[k] += one[k]; });
          }
          each_of<K>([&](auto k) { put<R>(to + k * width, s[k]); });
        });
      });
    });
    for (int k = 0; k < K; k++)
      for (i64 j = 0; j < c; j++) sums[k * c + j] += double(work[k * width + place<T>(j)]);
  }
}

template <class F, class T, class R>
void gradient_columns(const T *x, i64 xp, const T *dy, i64 gp, T *dx, i64 yp, i64 rows, i64 c,
                      const Numbers<R> &of, Out &out) {
  row_by_row<T>(rows, c, [&](i64 r, auto count) {
    out.sweep_to<T>(dx + r * yp, c, [&](i64 j, auto at) {
      const Coefficients<V<T>> q = of_channels<F, T>(of, j);
      const V<T> zero{}, k = zero - take<T>(of.k + j), h = take<T>(of.h + j);
      for (i64 i = r; i < r + count; i++) {
        const V<T> e = at.read(x + i * xp + j, zero), g = at.read(dy + i * gp + j, zero);
        at.write(dx + i * yp + j, gradient_of<F>(e, g, q, k, h));
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

// Calls f(sample, number of the part, first position, positions, numbers, out) for all parts of all
// samples.
template <class F, class T, class R, class Call> void each_part(const Job<T, R> &job, Call f) {
  const i64 parts = parts_of(job), room = KINDS * in_vectors<T>(job.c);
  Zeros<R> numbers(room * omp_get_max_threads());
  share_out(job.n * parts, streamed(job, true), [&](i64 unit, Out &out) {
    i64 n = unit / parts, i = unit % parts, first = job.p * i / parts;
    const Numbers<R> of = arranged<F, T>(job.from(n * job.c), job.c,
                                         numbers.data() + room * omp_get_thread_num());
    f(n, unit, first, job.p * (i + 1) / parts - first, of, out);
  });
}

template <class F, class T, class R> void apply(const Job<T, R> &job, bool columns) {
  const Strides &xs = job.xs, &ys = job.ys;
  if (columns)
    each_part<F>(job, [&](i64 n, i64, i64 p, i64 rows, const Numbers<R> &of, Out &out) {
      apply_columns<F>(job.x + n * xs.n + p * xs.p, xs.p, job.out + n * ys.n + p * ys.p, ys.p, rows,
                       job.c, of, out);
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
  i64 parts = parts_of(job), width = K * job.c, room = K * in_vectors<T>(job.c);
  std::vector<double> totals(job.n * parts * width);
  Zeros<R> work(room * omp_get_max_threads());
  each_part<F>(job, [&](i64 n, i64 unit, i64 p, i64 rows, const Numbers<R> &of, Out &) {
    sum_columns<F>(job.x + n * xs.n + p * xs.p, xs.p, job.dy + n * gs.n + p * gs.p, gs.p, rows,
                   job.c, of, totals.data() + unit * width,
                   work.data() + room * omp_get_thread_num());
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
    each_part<F>(job, [&](i64 n, i64, i64 p, i64 rows, const Numbers<R> &of, Out &out) {
      gradient_columns<F>(job.x + n * xs.n + p * xs.p, xs.p, job.dy + n * gs.n + p * gs.p, gs.p,
                          job.out + n * ys.n + p * ys.p, ys.p, rows, job.c, of, out);
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
