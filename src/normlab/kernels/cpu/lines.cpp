// Areas of single positions: statistics over the channels, or over groups of them, at each position
// of each sample, as layer normalization has them in transformers.
//
// A tensor is walked in one of two orders of memory (see normalize.cpp), a tile of positions at a time,
// which stays in cache over all passes:
//   columns  a position is a row of contiguous channels, and sums run along it
//   rows     a channel is a row of contiguous positions, and sums are taken at all positions of the
//            tile side by side, channel after channel
//
// Sums over an area are taken in R over at most CHUNK terms, beyond that in double. Sums over areas,
// for gamma, beta and tau, are in double over a number of pieces that depends on the shape alone.

#include "call.h"
#include "dots.h"
#include "stream.h"

namespace {

constexpr i64 CHUNK = 1024;       // terms of a sum in R
constexpr i64 PIECES = 32;        // parts whose sums for parameters are taken apart
constexpr i64 SHORT = 64;         // positions whose sums for parameters are in R
// Bytes of a tile of columns: no more, so that reading and writing memory overlap.
constexpr i64 FIRST = 4 << 10;
constexpr i64 SECOND = 256 << 10; // bytes of a tile of rows, in a second-level cache

// Whether a result is stored past the caches: where it is larger than what they hold, and runs of so
// many positions follow each other, or have whole lines of memory, as vectors of two registers must.
template <class E, class T> bool streamed(const Call &k, const void *result, i64 wide) {
  const T *to = static_cast<const T *>(result);
  if (k.dr || !past_caches(to, k.n * k.c * k.p)) return false;
  return (!PAIRED<V<E>> && !k.columns && wide == k.p && k.yc == k.p) ||
         whole_lines(to, k.yn | (k.columns ? k.bc | k.yp : k.p | k.yc));
}

// With vectors V<E>: E is T, but R over rows that do not begin with lines of memory, where vectors of two
// registers would cross them. What the two find differs in the last bits.
template <class T, class R, class E> struct Job {
  const Call &k;
  bool columns() const { return std::is_same_v<E, T> && k.columns; }
  R *means = static_cast<R *>(k.mean), *moments = static_cast<R *>(k.moment);
  const Affine<R> given;
  bool centred = k.shift || (k.scale && k.about_mean); // whether there is a mean
  // Over columns, gamma, beta and tau where vectors take them, each group's from a vector on.
  i64 stride = in_vectors<E>(k.bc), kind = k.c / k.bc * stride;
  Zeros<R> room;
  R *vectors = room.data();
  explicit Job(const Call &call) : k(call), given(call), room(k.columns ? 3 * kind : 0) {
    if (!k.columns) return;
    R *to = vectors;
    for (const R *from : {given.gamma, given.beta, given.tau})
      for (i64 c = 0; c < k.c; c += k.bc, to += stride)
        std::copy(from + c, from + c + k.bc, to), arrange<E>(to, stride);
  }
  Job(const Job &) = delete;
};

// Positions of a tile.
template <class T> i64 wide(const Call &k, i64 tensors) {
  i64 bytes = k.bc * i64(sizeof(T));
  if (k.columns) return std::min(k.p, std::max<i64>(1, std::min<i64>(SHORT, FIRST / bytes)));
  if (k.p * bytes <= SECOND) return k.p; // rows then follow each other
  return std::min(k.p, std::max<i64>(SHORT, SECOND / (tensors * bytes) / SHORT * SHORT));
}

// A group of channels of one sample, over a tile of its positions; `at` is its first statistic.
struct Unit {
  i64 n, c, p, width, at;
  // The group's place among numbers of channels, `stride` a group.
  i64 group(const Call &k, i64 stride) const { return c / k.bc * stride; }
  template <class T> const T *x(const Call &k) const {
    return static_cast<const T *>(k.x) + n * k.xn + c * k.xc + p * k.xp;
  }
  template <class T> const T *dy(const Call &k) const {
    return static_cast<const T *>(k.dy) + n * k.gn + c * k.gc + p * k.gp;
  }
  template <class T> const T *residual(const Call &k) const {
    return static_cast<const T *>(k.r) + n * k.yn + c * k.yc + p * k.yp;
  }
  template <class T> T *out(const Call &k, void *y) const {
    return static_cast<T *>(y) + n * k.yn + c * k.yc + p * k.yp;
  }
};
inline Unit unit_of(const Call &k, i64 index, i64 wide) {
  i64 tiles = (k.p + wide - 1) / wide, groups = k.c / k.bc;
  i64 n = index / tiles / groups, g = index / tiles % groups, p = index % tiles * wide;
  return {n, g * k.bc, p, std::min(wide, k.p - p), n * k.mn + g * k.mg + p * k.mp};
}
inline i64 units_of(const Call &k, i64 wide) {
  return k.n * (k.c / k.bc) * ((k.p + wide - 1) / wide);
}

// x-hat = (x - mu) * inverse + rest, with rest what rounding took from the mean;
// dx = h * p1 - (x - mub) * q - r with h = gamma * dL/du: see closed_form.py.
enum { MU, INVERSE, REST, P1, MUB, Q, R0, SUM, SQUARE, ROOM };

// Numbers for each position of the tile; over rows, where vectors V<E> take them.
template <class R> struct Tile {
  i64 width;
  Zeros<R> room;
  std::vector<double> sums; // of x or h, and of squares or h * x-hat
  explicit Tile(i64 w) : width((w + 63) / 64 * 64), room(ROOM * width), sums(std::size_t(2 * width)) {}
  R *operator[](i64 i) { return room.data() + i * width; }
  double *total(i64 i) { return sums.data() + i * width; }
  template <class E> void arranged(std::initializer_list<int> kinds) {
    for (int kind : kinds) arrange<E>((*this)[kind], width);
  }
};

// --- sums along a row of channels, or side by side over rows of positions -------------------------

// Sums of x - mu, and of its square, along a row of channels.
template <class T, class R>
void square_row(const T *row, i64 m, R mu, double &sum, double &squares) {
  sum = squares = 0;
  for (i64 from = 0; from < m; from += CHUNK) {
    alignas(64) R lanes[2 * LANES<R>] = {};
    run_moments<T, R>(row + from, std::min(CHUNK, m - from), mu, lanes);
    sum += total<R>(take<R>(lanes)), squares += total<R>(take<R>(lanes + LANES<R>));
  }
}

// The same at positions side by side. Four channels are added up before the sums are read.
template <class E, class T, class R>
void square_rows(const T *x, i64 xc, i64 bc, const R *mu, R *part, R *square, i64 width) {
  if constexpr (DOTTED<E>)
    if (std::all_of(mu, mu + in_vectors<E>(width), [](R m) { return m == 0; }))
      return matrix_dots(x, xc, x, xc, bc, width, part, square);
  i64 c = 0;
  for (; c + 4 <= bc; c += 4) {
    const T *a = x + c * xc, *b = a + xc, *d = b + xc, *e = d + xc;
    sweep<E>(width, [&](i64 i, auto at) {
      for (const T *next : {a, b, d, e}) soon(next + 4 * xc + i);
      V<E> mean = take<E>(mu + i);
      V<E> z0 = at.read(a + i, mean) - mean, z1 = at.read(b + i, mean) - mean;
      V<E> z2 = at.read(d + i, mean) - mean, z3 = at.read(e + i, mean) - mean;
      put<E>(part + i, take<E>(part + i) + ((z0 + z1) + (z2 + z3)));
      put<E>(square + i, take<E>(square + i) + ((z0 * z0 + z1 * z1) + (z2 * z2 + z3 * z3)));
    });
  }
  for (; c < bc; c++) {
    const T *a = x + c * xc;
    sweep<E>(width, [&](i64 i, auto at) {
      V<E> mean = take<E>(mu + i), z = at.read(a + i, mean) - mean;
      put<E>(part + i, take<E>(part + i) + z);
      put<E>(square + i, take<E>(square + i) + z * z);
    });
  }
}

template <class E, class T, class R>
void square_tile(const Call &k, const T *x, Tile<R> &t, i64 width) {
  double *sum = t.total(0), *squares = t.total(1);
  const R *mu = t[MU];
  if (k.columns) {
    for (i64 i = 0; i < width; i++) square_row(x + i * k.xp, k.bc, mu[i], sum[i], squares[i]);
    return;
  }
  R *part = t[SUM], *square = t[SQUARE];
  std::fill(sum, sum + width, 0.0);
  std::fill(squares, squares + width, 0.0);
  for (i64 from = 0; from < k.bc; from += CHUNK) {
    std::fill(part, part + t.width, R(0));
    std::fill(square, square + t.width, R(0));
    square_rows<E>(x + from * k.xc, k.xc, std::min(CHUNK, k.bc - from), mu, part, square, width);
    for (i64 i = 0; i < width; i++)
      sum[i] += double(part[place<E>(i)]), squares[i] += double(square[place<E>(i)]);
  }
}

// --- statistics of a tile ------------------------------------------------------------------------

template <class T, class R, class E>
void given_tile(const Job<T, R, E> &job, const Unit &u, Tile<R> &t) {
  const Call &k = job.k;
  R *mu = t[MU], *inverse = t[INVERSE], *rest = t[REST];
  for (i64 i = 0; i < u.width; i++) {
    mu[i] = k.shift ? job.means[u.at + i * k.mp] : R(0);
    inverse[i] = k.scale ? job.moments[u.at + i * k.mp] : R(1);
    rest[i] = 0;
  }
  std::fill(mu + u.width, mu + t.width, R(0)); // lanes of no position count for nothing
  std::fill(inverse + u.width, inverse + t.width, R(0));
  if (k.scale)
    for (i64 i = 0; i < u.width; i++) inverse[i] = R(1.0 / std::sqrt(double(inverse[i]) + k.eps));
  if (!job.columns()) t.template arranged<E>({MU, INVERSE, REST});
}

// Moments are those about the first channel, or about 0 where that takes less, in one pass; where that
// lies so far from the mean that digits cancel, or squares overflow R, about the mean, in a second.
template <class T, class R, class E>
void measured_tile(const Job<T, R, E> &job, const Unit &u, Tile<R> &t) {
  const Call &k = job.k;
  R *mu = t[MU], *inverse = t[INVERSE], *rest = t[REST];
  double m = double(k.bc), *sum = t.total(0), *squares = t.total(1);
  const T *x = u.x<T>(k);
  R *origin = rest; // whose place is free, one after the other
  const auto measured = [&] {
    std::copy(origin, origin + t.width, mu);
    if (!job.columns()) t.template arranged<E>({MU});
    square_tile<E>(k, x, t, u.width);
  };
  std::fill(origin, origin + t.width, R(0));
  if (job.centred)
    for (i64 i = 0; i < u.width; i++)
      origin[i] = DOTTED<E> ? first_origin(x, i * k.xp) : load(x, i * k.xp);
  measured();
  int poor = 0;
  for (i64 i = 0; i < u.width; i++)
    poor += (job.centred & cancels(sum[i], squares[i], m)) | lost<E>(sum[i], squares[i], m);
  if (poor) {
    for (i64 i = 0; i < u.width; i++) {
      const double mean = job.centred ? double(origin[i]) + sum[i] / m : 0.0;
      if (lost<E>(sum[i], squares[i], m)) origin[i] = next_origin<R>(mean);
      else if (job.centred && cancels(sum[i], squares[i], m)) origin[i] = R(mean);
    }
    measured();
  }
  double about_zero = k.about_mean ? 0.0 : 1.0;
  if (job.centred) { // the mean is in `sum` from here on, and the moment in `squares`
    for (i64 i = 0; i < u.width; i++) {
      double left = sum[i] / m, mean = double(origin[i]) + left + (left - left); // NaN where infinite
      double square = squares[i] - left * sum[i];
      squares[i] = (square < 0 ? 0.0 : square) / m + about_zero * mean * mean;
      sum[i] = mean;
    }
    for (i64 i = 0; i < u.width; i++) job.means[u.at + i * k.mp] = R(sum[i]);
  } else {
    for (i64 i = 0; i < u.width; i++) squares[i] /= m, sum[i] = 0;
  }
  if (k.scale)
    for (i64 i = 0; i < u.width; i++) job.moments[u.at + i * k.mp] = R(squares[i]);
  double shift = k.shift ? 1.0 : 0.0;
  if (k.scale)
    for (i64 i = 0; i < u.width; i++) squares[i] = 1.0 / std::sqrt(squares[i] + k.eps);
  else
    std::fill(squares, squares + u.width, 1.0);
  for (i64 i = 0; i < u.width; i++) {
    mu[i] = R(shift * sum[i]);
    double left = double(mu[i]) - shift * sum[i];
    rest[i] = R(left != 0 ? left * squares[i] : 0.0); // 1/D may be infinite
    inverse[i] = R(squares[i]);
  }
  if (!job.columns()) t.template arranged<E>({MU, INVERSE, REST});
}

// Coefficients of the gradient, from the sums of h and of h * x-hat.
template <class T, class R, class E>
void slope_tile(const Job<T, R, E> &job, const Unit &u, Tile<R> &t) {
  const Call &k = job.k;
  R *p1 = t[P1], *mub = t[MUB], *q = t[Q], *r = t[R0];
  double m = double(k.bc), *sum = t.total(0), *sum_x = t.total(1);
  bool single = k.scale && k.bc == 1 && !k.shift && !k.about_mean;
  double through = k.from_batch && k.scale && !single ? 1 / m : 0;
  double shift = k.from_batch && k.shift ? 1 / m : 0;
  for (i64 i = 0; i < u.width; i++) mub[i] = k.scale ? job.moments[u.at + i * k.mp] : R(0);
  for (i64 i = 0; i < u.width; i++) {
    double inside = double(mub[i]) + k.eps, inverse = k.scale ? 1.0 / std::sqrt(inside) : 1.0;
    // Of one member, 1 - x^2/(M + eps) would cancel.
    p1[i] = R(single && k.from_batch ? inverse * k.eps / inside : inverse);
    q[i] = through != 0 ? R(through * sum_x[i] / inside) : R(0);
    r[i] = shift != 0 ? R(shift * sum[i] * inverse) : R(0);
  }
  if (k.deps)
    for (i64 i = 0; i < u.width; i++)
      k.deps[u.at + i * k.mp] = -sum_x[i] / (2 * (double(mub[i]) + k.eps));
  for (i64 i = 0; i < u.width; i++)
    mub[i] = k.about_mean && job.centred ? job.means[u.at + i * k.mp] : R(0);
  if (!job.columns()) t.template arranged<E>({P1, MUB, Q, R0});
}

// f(row, count) for all rows of channels, four at a time where vectors are of two registers: more is
// read of each position then than of the rows.
template <class E, class F> inline void rows_of(i64 bc, F f) {
  i64 c = 0;
  if constexpr (PAIRED<V<E>>)
    for (; c + 4 <= bc; c += 4) f(c, std::integral_constant<int, 4>{});
  for (; c < bc; c++) f(c, std::integral_constant<int, 1>{});
}

// --- forward -------------------------------------------------------------------------------------

template <int A, class T, class R, class E>
void apply_tile(const Job<T, R, E> &job, const Unit &u, Tile<R> &t, Out &out) {
  const Call &k = job.k;
  const T *x = u.x<T>(k);
  T *y = u.out<T>(k, k.y);
  const T *r = added(A) ? u.residual<T>(k) : nullptr;
  const R *mu = t[MU], *inverse = t[INVERSE], *rest = t[REST];
  const V<E> zero{};
  if (job.columns()) {
    const R *gamma = job.vectors + u.group(k, job.stride), *beta = gamma + job.kind;
    const R *tau = beta + job.kind;
    for (i64 i = 0; i < u.width; i++) {
      const T *from = x + i * k.xp;
      T *to = y + i * k.yp;
      V<E> mean = all<E>(mu[i]), a = all<E>(inverse[i]), b = all<E>(rest[i]);
      out.sweep_to<E>(to, k.bc, [&](i64 j, auto at) {
        V<E> xhat = (at.read(from + j, zero) - mean) * a + b;
        V<E> v = xhat * take<E>(gamma + j) + take<E>(beta + j);
        if (added(A)) v += at.read(r + i * k.yp + j, zero);
        at.write(to + j, activate<A>(v, plain(A) == TLU ? take<E>(tau + j) : zero));
      });
    }
    return;
  }
  const R *gamma = job.given.gamma + u.c, *beta = job.given.beta + u.c, *tau = job.given.tau + u.c;
  rows_of<E>(k.bc, [&](i64 first, auto count) {
    constexpr int ROWS = decltype(count)::value;
    V<R> weight[ROWS], offset[ROWS], least[ROWS];
    for (int n = 0; n < ROWS; n++)
      weight[n] = all<R>(gamma[first + n]), offset[n] = all<R>(beta[first + n]),
      least[n] = all<R>(tau[first + n]);
    out.sweep_to<E>(y + first * k.yc, u.width, [&](i64 i, auto at) {
      const V<E> mean = take<E>(mu + i), a = take<E>(inverse + i), b = take<E>(rest + i);
      each_of<ROWS>([&](auto n) INLINED {
        const i64 c = first + n;
        V<E> z = at.read(x + c * k.xc + i, zero) - mean;
        V<E> v = (z * a + b) * alike<E>(weight[n]) + alike<E>(offset[n]);
        if (added(A)) v += at.read(r + c * k.yc + i, zero);
        at.write(y + c * k.yc + i, activate<A>(v, alike<E>(least[n])));
      });
    });
  });
}

template <int A, class T, class R, class E> void forward(const Job<T, R, E> &job) {
  const Call &k = job.k;
  i64 width = wide<T>(k, 1);
  std::vector<Tile<R>> tiles(omp_get_max_threads(), Tile<R>(width));
  i64 units = units_of(k, width);
  share_out(units, streamed<E, T>(k, k.y, width), [&](i64 index, Out &out) {
    Unit u = unit_of(k, index, width);
    Tile<R> &t = tiles[omp_get_thread_num()];
    k.flags & MEASURE ? measured_tile(job, u, t) : given_tile(job, u, t);
    if (k.y) apply_tile<A>(job, u, t, out);
  });
}

// --- backward ------------------------------------------------------------------------------------

// Sums of h and h * x-hat at each position, along a number of rows of channels from i on; and, added to
// what there is, of g * x-hat, of g = dL/du and of dy where the threshold holds for each channel, one
// kind after the other. These, and g in `slopes`, are where vectors of T put them.
template <int A, int ROWS, class T, class R, class E>
void sums_of_rows(const Job<T, R, E> &job, const Unit &u, Tile<R> &t, i64 i, R *sums, R *slopes) {
  const Call &k = job.k;
  const R *gamma = job.vectors + u.group(k, job.stride), *beta = gamma + job.kind;
  const R *tau = beta + job.kind;
  const T *x = u.x<T>(k) + i * k.xp, *dy = u.dy<T>(k) + i * k.gp;
  const T *r = added(A) ? u.residual<T>(k) + i * k.yp : nullptr;
  R *dgamma = sums + u.group(k, job.stride), *dbeta = dgamma + job.kind, *dtau = dbeta + job.kind;
  double *sum_h = t.total(0) + i, *sum_hx = t.total(1) + i;
  V<R> mean[ROWS], inverse[ROWS];
  for (int n = 0; n < ROWS; n++)
    mean[n] = all<R>(t[MU][i + n]), inverse[n] = all<R>(t[INVERSE][i + n]), sum_h[n] = sum_hx[n] = 0;
  for (i64 from = 0; from < k.bc; from += CHUNK) {
    V<R> s[ROWS] = {}, q[ROWS] = {};
    const auto add = [&](i64 j, auto at) INLINED {
      const V<E> zero{};
      if (ROWS > 1)
        for (int n = 0; n < ROWS; n++) {
          soon(x + (2 * ROWS + n) * k.xp + j), soon(dy + (2 * ROWS + n) * k.gp + j);
        }
      each_of<REGISTERS<E>>([&](auto half) INLINED { // apart, since there are many sums
        const i64 here = j + half * LANES<R>;
        const V<R> scale = take<R>(gamma + here);
        V<R> g_sum = take<R>(dbeta + here), gx_sum = take<R>(dgamma + here), d_sum{};
        each_of<ROWS>([&](auto n) INLINED {
          const V<R> v = only<half>(at.read(x + n * k.xp + j, all<E>(t[MU][i + n])));
          const V<R> d = only<half>(at.read(dy + n * k.gp + j, zero));
          const V<R> xhat = (v - mean[n]) * inverse[n];
          V<R> g = d;
          if (A != NONE) {
            const V<R> least = plain(A) == TLU ? take<R>(tau + here) : V<R>{};
            V<R> before = xhat * scale + take<R>(beta + here);
            if (added(A)) before += only<half>(at.read(r + n * k.yp + j, zero));
            g = slope<A, MORE<E>>(before, least, d);
            put<R>(slopes + (i + n) * job.stride + here, g);
          }
          const V<R> h = g * scale;
          s[n] += h, q[n] += h * xhat;
          g_sum += g, gx_sum += g * xhat;
          if (plain(A) == TLU) d_sum += d - g;
        });
        put<R>(dbeta + here, g_sum), put<R>(dgamma + here, gx_sum);
        if (plain(A) == TLU) put<R>(dtau + here, take<R>(dtau + here) + d_sum);
      });
    };
    const i64 to = std::min(k.bc, from + CHUNK);
    i64 j = from;
    for (; j + LANES<E> <= to; j += LANES<E>) add(j, Whole<E>{});
    if (j < to) add(j, Part<E>{to - j});
    each_of<ROWS>([&](auto n) { sum_h[n] += total<R>(s[n]), sum_hx[n] += total<R>(q[n]); });
  }
}

// The same sums along rows of positions, those of channels in double.
template <int A, int ROWS, class T, class R, class E>
void sums_at_positions(const Job<T, R, E> &job, const Unit &u, Tile<R> &t, i64 c, double *into) {
  const Call &k = job.k;
  const T *x = u.x<T>(k) + c * k.xc, *dy = u.dy<T>(k) + c * k.gc;
  const T *r = added(A) ? u.residual<T>(k) + c * k.yc : nullptr;
  const R *gamma = job.given.gamma + u.c + c, *beta = job.given.beta + u.c + c;
  const R *tau = job.given.tau + u.c + c, *mu = t[MU], *inverse = t[INVERSE];
  R *part = t[SUM], *part_x = t[SQUARE];
  V<R> scale[ROWS], s0[ROWS] = {}, s1[ROWS] = {}, s2[ROWS] = {};
  for (int n = 0; n < ROWS; n++) scale[n] = all<R>(gamma[n]);
  const auto add = [&](i64 i, auto at) INLINED {
    const V<E> zero{};
    for (int n = 0; n < ROWS; n++) // of the next channels
      soon(x + (ROWS + n) * k.xc + i), soon(dy + (ROWS + n) * k.gc + i);
    each_of<REGISTERS<E>>([&](auto half) INLINED {
      const i64 here = i + half * LANES<R>;
      const V<R> mean = take<R>(mu + here), a = take<R>(inverse + here);
      V<R> h_sum = take<R>(part + here), hx_sum = take<R>(part_x + here);
      each_of<ROWS>([&](auto n) INLINED {
        const V<R> d = only<half>(at.read(dy + n * k.gc + i, zero));
        const V<R> v = only<half>(at.read(x + n * k.xc + i, zero)), xhat = (v - mean) * a;
        V<R> g = d;
        if (A != NONE) {
          V<R> before = xhat * scale[n] + all<R>(beta[n]);
          if (added(A)) before += only<half>(at.read(r + n * k.yc + i, zero));
          g = slope<A, MORE<E>>(before, all<R>(tau[n]), d);
        }
        const V<R> h = g * scale[n];
        h_sum += h, hx_sum += h * xhat;
        s0[n] += g * xhat, s1[n] += g;
        if (plain(A) == TLU) s2[n] += d - g;
      });
      put<R>(part + here, h_sum), put<R>(part_x + here, hx_sum);
    });
  };
  i64 i = 0;
  for (; i + LANES<E> <= u.width; i += LANES<E>) add(i, Whole<E>{});
  if (i < u.width) add(i, Part<E>{u.width - i});
  double *to = into + u.c + c;
  each_of<ROWS>([&](auto n) {
    to[n] += total<R>(s0[n]), to[k.c + n] += total<R>(s1[n]);
    if (plain(A) == TLU) to[2 * k.c + n] += total<R>(s2[n]);
  });
}

template <int A, class T, class R, class E>
void sums_tile(const Job<T, R, E> &job, const Unit &u, Tile<R> &t, R *sums, R *slopes, double *into) {
  const Call &k = job.k;
  if (job.columns()) {
    i64 i = 0;
    for (; i + 4 <= u.width; i += 4) sums_of_rows<A, 4>(job, u, t, i, sums, slopes);
    for (; i < u.width; i++) sums_of_rows<A, 1>(job, u, t, i, sums, slopes);
    return;
  }
  double *sum_h = t.total(0), *sum_hx = t.total(1);
  R *part = t[SUM], *part_x = t[SQUARE];
  std::fill(sum_h, sum_h + u.width, 0.0);
  std::fill(sum_hx, sum_hx + u.width, 0.0);
  for (i64 from = 0; from < k.bc; from += CHUNK) {
    const i64 to = std::min(from + CHUNK, k.bc);
    std::fill(part, part + t.width, R(0));
    std::fill(part_x, part_x + t.width, R(0));
    i64 c = from;
    if constexpr (PAIRED<V<E>>)
      for (; c + 4 <= to; c += 4) sums_at_positions<A, 4>(job, u, t, c, into);
    for (; c < to; c++) sums_at_positions<A, 1>(job, u, t, c, into);
    for (i64 i = 0; i < u.width; i++)
      sum_h[i] += double(part[place<E>(i)]), sum_hx[i] += double(part_x[place<E>(i)]);
  }
}

template <int A, class T, class R, class E>
void gradient_tile(const Job<T, R, E> &job, const Unit &u, Tile<R> &t, const R *slopes, Out &out) {
  const Call &k = job.k;
  const T *x = u.x<T>(k), *dy = u.dy<T>(k), *r = added(A) ? u.residual<T>(k) : nullptr;
  T *dx = u.out<T>(k, k.dx), *dr = added(A) && k.dr ? u.out<T>(k, k.dr) : nullptr;
  const R *mu = t[MU], *inverse = t[INVERSE], *p1 = t[P1], *mub = t[MUB], *q = t[Q];
  const R *less = t[R0];
  const V<E> zero{};
  if (job.columns()) {
    const R *gamma = job.vectors + u.group(k, job.stride);
    for (i64 i = 0; i < u.width; i++) {
      const T *v = x + i * k.xp, *w = dy + i * k.gp;
      T *to = dx + i * k.yp;
      const R *kept = slopes + i * job.stride;
      V<E> mean = all<E>(mub[i]), a = all<E>(p1[i]), b = all<E>(q[i]), off = all<E>(less[i]);
      out.sweep_to<E>(to, k.bc, [&](i64 j, auto at) {
        V<E> g = A == NONE ? at.read(w + j, zero) : take<E>(kept + j);
        if (added(A) && dr) at.write(dr + i * k.yp + j, g);
        V<E> direct = g * take<E>(gamma + j) * a - off;
        at.write(to + j, less_through(direct, at.read(v + j, zero) - mean, b));
      });
    }
    return;
  }
  const R *gamma = job.given.gamma + u.c, *beta = job.given.beta + u.c, *tau = job.given.tau + u.c;
  rows_of<E>(k.bc, [&](i64 first, auto count) {
    constexpr int ROWS = decltype(count)::value;
    V<R> weight[ROWS];
    for (int n = 0; n < ROWS; n++) weight[n] = all<R>(gamma[first + n]);
    out.sweep_to<E>(dx + first * k.yc, u.width, [&](i64 i, auto at) {
      const V<E> a = take<E>(p1 + i), mean = take<E>(mub + i), b = take<E>(q + i);
      const V<E> off = take<E>(less + i);
      each_of<ROWS>([&](auto n) INLINED {
        const i64 c = first + n;
        const V<E> v = at.read(x + c * k.xc + i, zero), scale = alike<E>(weight[n]);
        V<E> g = at.read(dy + c * k.gc + i, zero);
        if (A != NONE) {
          V<E> before = (v - take<E>(mu + i)) * take<E>(inverse + i) * scale + all<E>(beta[c]);
          if (added(A)) before += at.read(r + c * k.yc + i, zero);
          g = slope<A>(before, all<E>(tau[c]), g);
        }
        if (added(A) && dr) at.write(dr + c * k.yc + i, g);
        at.write(dx + c * k.yc + i, less_through(g * scale * a - off, v - mean, b));
      });
    });
  });
}

// Sums for gamma, beta and tau, one of each piece.
struct Parameters {
  i64 c, count;
  std::vector<double> sums;
  Parameters(i64 c, i64 count) : c(c), count(count), sums(std::size_t(3 * c * count)) {}
  double *of(i64 piece) { return sums.data() + piece * 3 * c; }
  template <class R> void finish(const Call &k) {
    for (i64 i = 1; i < count; i++)
      for (i64 j = 0; j < 3 * c; j++) sums[j] += of(i)[j];
    give<R>(k, GAMMA, of(0), k.dgamma), give<R>(k, BETA, of(0) + c, k.dbeta);
    give<R>(k, TAU, of(0) + 2 * c, k.dtau);
  }
};

template <int A, class T, class R, class E> void backward(const Job<T, R, E> &job) {
  const Call &k = job.k;
  i64 width = wide<T>(k, 2), units = units_of(k, width);
  i64 least = job.columns() ? (SHORT + width - 1) / width : 1; // units of a piece
  i64 count = std::max<i64>(1, std::min<i64>(PIECES, units / least));
  std::vector<Tile<R>> tiles(omp_get_max_threads(), Tile<R>(width));
  const i64 kinds = job.columns() ? 3 * job.kind : 0; // sums over columns
  const i64 room = job.columns() ? in_vectors<bf16>(kinds + (A == NONE ? 0 : width * job.stride)) : 0;
  Zeros<R> scratch(room * omp_get_max_threads());
  Parameters all(k.c, count);
  share_out(count, streamed<E, T>(k, k.dx, width), [&](i64 piece, Out &out) {
    const i64 last = units * (piece + 1) / count;
    Tile<R> &t = tiles[omp_get_thread_num()];
    R *sums = scratch.data() + room * omp_get_thread_num(), *slopes = sums + kinds;
    double *into = all.of(piece);
    i64 rows = 0;
    std::fill(sums, slopes, R(0));
    for (i64 index = units * piece / count; index < last; index++) {
      Unit u = unit_of(k, index, width);
      given_tile(job, u, t);
      sums_tile<A>(job, u, t, sums, slopes, into);
      if (job.columns() && ((rows += u.width) >= SHORT || index + 1 == last)) {
        const R *from = sums;
        for (double *to = into; to < into + 3 * k.c; to += k.bc, from += job.stride)
          for (i64 j = 0; j < k.bc; j++) to[j] += double(from[place<E>(j)]);
        std::fill(sums, slopes, R(0));
        rows = 0;
      }
      slope_tile(job, u, t);
      if (k.dx) gradient_tile<A>(job, u, t, slopes, out);
    }
  });
  all.template finish<R>(k);
}

// Whether vectors of two registers pay: each takes a line of memory, and rows begin with one.
template <class T> bool lined(const Call &k) {
  const auto whole = [&](const void *p, i64 n, i64 c) {
    return !p || whole_lines(static_cast<const T *>(p), n | c);
  };
  return k.columns || (whole(k.x, k.xn, k.xc) && whole(k.dy, k.gn, k.gc) &&
                       whole(k.y, k.yn, k.yc) && whole(k.dx, k.yn, k.yc));
}

template <int A, class T, class E> void pass(const Call &k, bool back) {
  Job<T, typename Math<T>::type, E> job(k);
  back ? backward<A>(job) : forward<A>(job);
}

int run(const Call &k, int dtype, bool back) noexcept {
  return chosen(k, dtype, [&](auto act, auto element) {
    constexpr int A = decltype(act)::value;
    using T = decltype(element);
    if (!PAIRED<V<T>> || lined<T>(k)) pass<A, T, T>(k, back);
    else pass<A, T, typename Math<T>::type>(k, back);
  });
}

} // namespace

EXPORT int normlab_lines_forward(const Call *call, int dtype) noexcept {
  return run(*call, dtype, false);
}
EXPORT int normlab_lines_backward(const Call *call, int dtype) noexcept {
  return run(*call, dtype, true);
}
