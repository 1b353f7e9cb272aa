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
#include "stream.h"

namespace {

constexpr i64 CHUNK = 1024;       // terms of a sum in R
constexpr i64 PIECES = 32;        // parts whose sums for parameters are taken apart
constexpr i64 SHORT = 64;         // positions whose sums for parameters are in R
// Bytes of a tile of columns: no more, so that reading and writing memory overlap.
constexpr i64 FIRST = 4 << 10;
constexpr i64 SECOND = 256 << 10; // bytes of a tile of rows, in a second-level cache

// Whether a result is stored past the caches: where it is larger than what they hold, and runs of so
// many positions follow each other, or have whole lines of memory.
template <class T> bool streamed(const Call &k, const void *result, i64 wide) {
  const T *to = static_cast<const T *>(result);
  if (k.dr || !past_caches(to, k.n * k.c * k.p)) return false;
  return (!k.columns && wide == k.p && k.yc == k.p) ||
         whole_lines(to, k.yn | (k.columns ? k.bc | k.yp : k.p | k.yc));
}

template <class T, class R> struct Job {
  const Call &k;
  R *means = static_cast<R *>(k.mean), *moments = static_cast<R *>(k.moment);
  const Affine<R> given;
  bool centred = k.shift || (k.scale && k.about_mean); // whether there is a mean
  explicit Job(const Call &call) : k(call), given(call) {}
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

// Numbers for each position of the tile.
template <class R> struct Tile {
  i64 width;
  std::vector<R> room;
  std::vector<double> sums; // of x or h, and of squares or h * x-hat
  explicit Tile(i64 w)
      : width((w + 63) / 64 * 64), room(std::size_t(ROOM * width)), sums(std::size_t(2 * width)) {}
  R *operator[](i64 i) { return room.data() + i * width; }
  double *total(i64 i) { return sums.data() + i * width; }
};

// --- sums along a row of channels, or side by side over rows of positions -------------------------

// Adds up what f(i, at) gives for the vectors of m elements, a pair each, in `sum` and `other`. Two
// vectors at a time, since an addition waits for the one before.
template <class R> struct Pair {
  V<R> a{}, b{};
};
template <class R, class F> inline void summed(i64 m, double &sum, double &other, F f) {
  sum = other = 0;
  for (i64 from = 0; from < m; from += CHUNK) {
    i64 to = std::min(m, from + CHUNK), i = from;
    Pair<R> s, t;
    for (; i + 2 * LANES<R> <= to; i += 2 * LANES<R>) {
      Pair<R> u = f(i, Whole<R>{}), v = f(i + LANES<R>, Whole<R>{});
      s.a += u.a, s.b += u.b, t.a += v.a, t.b += v.b;
    }
    sweep<R>(to - i, [&](i64 j, auto at) {
      Pair<R> u = f(i + j, at);
      s.a += u.a, s.b += u.b;
    });
    sum += total<R>(s.a + t.a), other += total<R>(s.b + t.b);
  }
}

// Sums of x - mu, and of its square.
template <class T, class R> void square_tile(const Call &k, const T *x, Tile<R> &t, i64 width) {
  double *sum = t.total(0), *squares = t.total(1);
  const R *mu = t[MU];
  if (k.columns) {
    for (i64 i = 0; i < width; i++) {
      const T *row = x + i * k.xp;
      V<R> mean = all<R>(mu[i]);
      summed<R>(k.bc, sum[i], squares[i], [&](i64 j, auto at) {
        V<R> z = at.read(row + j, mean) - mean;
        return Pair<R>{z, z * z};
      });
    }
    return;
  }
  const i64 xc = k.xc, bc = k.bc;
  R *part = t[SUM], *square = t[SQUARE];
  std::fill(sum, sum + width, 0.0);
  std::fill(squares, squares + width, 0.0);
  for (i64 from = 0; from < bc; from += CHUNK) {
    i64 to = std::min(from + CHUNK, bc), c = from;
    std::fill(part, part + width, R(0));
    std::fill(square, square + width, R(0));
    for (; c + 4 <= to; c += 4) {
      const T *a = x + c * xc, *b = a + xc, *d = b + xc, *e = d + xc;
      sweep<R>(width, [&](i64 i, auto at) {
        for (const T *next : {a, b, d, e}) soon(next + 4 * xc + i);
        V<R> mean = take<R>(mu + i);
        V<R> z0 = at.read(a + i, mean) - mean, z1 = at.read(b + i, mean) - mean;
        V<R> z2 = at.read(d + i, mean) - mean, z3 = at.read(e + i, mean) - mean;
        put<R>(part + i, take<R>(part + i) + ((z0 + z1) + (z2 + z3)));
        put<R>(square + i, take<R>(square + i) + ((z0 * z0 + z1 * z1) + (z2 * z2 + z3 * z3)));
      });
    }
    for (; c < to; c++) {
      const T *a = x + c * xc;
      sweep<R>(width, [&](i64 i, auto at) {
        V<R> mean = take<R>(mu + i), z = at.read(a + i, mean) - mean;
        put<R>(part + i, take<R>(part + i) + z);
        put<R>(square + i, take<R>(square + i) + z * z);
      });
    }
    for (i64 i = 0; i < width; i++) sum[i] += double(part[i]), squares[i] += double(square[i]);
  }
}

// --- statistics of a tile ------------------------------------------------------------------------

template <class T, class R> void given_tile(const Job<T, R> &job, const Unit &u, Tile<R> &t) {
  const Call &k = job.k;
  R *mu = t[MU], *inverse = t[INVERSE], *rest = t[REST];
  for (i64 i = 0; i < u.width; i++) {
    mu[i] = k.shift ? job.means[u.at + i * k.mp] : R(0);
    inverse[i] = k.scale ? job.moments[u.at + i * k.mp] : R(1);
    rest[i] = 0;
  }
  std::fill(mu + u.width, mu + t.width, R(0)); // lanes of no position count for nothing
  std::fill(inverse + u.width, inverse + t.width, R(0));
  if (!k.scale) return;
  for (i64 i = 0; i < u.width; i++) inverse[i] = R(1.0 / std::sqrt(double(inverse[i]) + k.eps));
}

// Moments are those about the first channel, in one pass; where that lies so far from the mean that
// digits cancel, or squares overflow R, about the mean, in a second.
template <class T, class R> void measured_tile(const Job<T, R> &job, const Unit &u, Tile<R> &t) {
  const Call &k = job.k;
  R *mu = t[MU], *inverse = t[INVERSE], *rest = t[REST];
  double m = double(k.bc), *sum = t.total(0), *squares = t.total(1);
  const T *x = u.x<T>(k);
  std::fill(mu, mu + t.width, R(0));
  if (job.centred)
    for (i64 i = 0; i < u.width; i++) mu[i] = load(x, i * k.xp);
  square_tile(k, x, t, u.width);
  if (job.centred) {
    int poor = 0;
    for (i64 i = 0; i < u.width; i++) poor += cancels(sum[i], squares[i], m);
    if (poor) {
      for (i64 i = 0; i < u.width; i++)
        if (cancels(sum[i], squares[i], m)) mu[i] = R(double(mu[i]) + sum[i] / m);
      square_tile(k, x, t, u.width);
    }
  }
  double about_zero = k.about_mean ? 0.0 : 1.0;
  if (job.centred) { // the mean is in `sum` from here on, and the moment in `squares`
    for (i64 i = 0; i < u.width; i++) {
      double left = sum[i] / m, mean = double(mu[i]) + left + (left - left); // NaN where infinite
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
}

// Coefficients of the gradient, from the sums of h and of h * x-hat.
template <class T, class R> void slope_tile(const Job<T, R> &job, const Unit &u, Tile<R> &t) {
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
}

// --- forward -------------------------------------------------------------------------------------

template <int A, class T, class R>
void apply_tile(const Job<T, R> &job, const Unit &u, Tile<R> &t, Out &out) {
  const Call &k = job.k;
  const T *x = u.x<T>(k);
  T *y = u.out<T>(k, k.y);
  const T *r = added(A) ? u.residual<T>(k) : nullptr;
  const R *mu = t[MU], *inverse = t[INVERSE], *rest = t[REST];
  const R *gamma = job.given.gamma + u.c, *beta = job.given.beta + u.c, *tau = job.given.tau + u.c;
  const V<R> zero{};
  if (k.columns) {
    for (i64 i = 0; i < u.width; i++) {
      const T *from = x + i * k.xp;
      T *to = y + i * k.yp;
      V<R> mean = all<R>(mu[i]), a = all<R>(inverse[i]), b = all<R>(rest[i]);
      out.sweep_to<R>(to, k.bc, [&](i64 j, auto at) {
        V<R> xhat = (at.read(from + j, zero) - mean) * a + b;
        V<R> v = xhat * at.read(gamma + j, zero) + at.read(beta + j, zero);
        if (added(A)) v += at.read(r + i * k.yp + j, zero);
        at.write(to + j, activate<A>(v, plain(A) == TLU ? at.read(tau + j, zero) : zero));
      });
    }
    return;
  }
  for (i64 c = 0; c < k.bc; c++) {
    V<R> weight = all<R>(gamma[c]), offset = all<R>(beta[c]), least = all<R>(tau[c]);
    const T *from = x + c * k.xc;
    T *to = y + c * k.yc;
    out.sweep_to<R>(to, u.width, [&](i64 i, auto at) {
      V<R> z = at.read(from + i, zero) - take<R>(mu + i);
      V<R> v = (z * take<R>(inverse + i) + take<R>(rest + i)) * weight + offset;
      if (added(A)) v += at.read(r + c * k.yc + i, zero);
      at.write(to + i, activate<A>(v, least));
    });
  }
}

template <int A, class T, class R> void forward(const Job<T, R> &job) {
  const Call &k = job.k;
  i64 width = wide<T>(k, 1);
  std::vector<Tile<R>> tiles(omp_get_max_threads(), Tile<R>(width));
  i64 units = units_of(k, width);
  share_out(units, streamed<T>(k, k.y, width), [&](i64 index, Out &out) {
    Unit u = unit_of(k, index, width);
    Tile<R> &t = tiles[omp_get_thread_num()];
    k.flags & MEASURE ? measured_tile(job, u, t) : given_tile(job, u, t);
    if (k.y) apply_tile<A>(job, u, t, out);
  });
}

// --- backward ------------------------------------------------------------------------------------

// Sums of h and h * x-hat at each position; of g = dL/du, g * x-hat and of dy where the threshold
// holds for each channel, over columns in `sums`, which are R, over rows in `into`. What of g is dear
// to compute is kept in `slopes`, over columns.
template <int A, class T, class R>
void sums_tile(const Job<T, R> &job, const Unit &u, Tile<R> &t, R *sums, R *slopes, double *into) {
  const Call &k = job.k;
  const T *x = u.x<T>(k), *dy = u.dy<T>(k), *r = added(A) ? u.residual<T>(k) : nullptr;
  const R *mu = t[MU], *inverse = t[INVERSE];
  const R *gamma = job.given.gamma + u.c, *beta = job.given.beta + u.c, *tau = job.given.tau + u.c;
  double *sum_h = t.total(0), *sum_hx = t.total(1);
  const V<R> zero{};
  if (k.columns) {
    R *dgamma = sums + u.c, *dbeta = dgamma + k.c, *dtau = dbeta + k.c;
    for (i64 i = 0; i < u.width; i++) {
      const T *v = x + i * k.xp, *w = dy + i * k.gp;
      V<R> mean = all<R>(mu[i]), a = all<R>(inverse[i]);
      R *kept = slopes + i * k.bc;
      summed<R>(k.bc, sum_h[i], sum_hx[i], [&](i64 j, auto at) {
        V<R> xhat = (at.read(v + j, mean) - mean) * a, d = at.read(w + j, zero), g = d;
        V<R> scale = at.read(gamma + j, zero);
        if (A != NONE) {
          V<R> least = plain(A) == TLU ? at.read(tau + j, zero) : zero;
          V<R> before = xhat * scale + at.read(beta + j, zero);
          if (added(A)) before += at.read(r + i * k.yp + j, zero);
          g = slope<A>(before, least, d);
          at.write(kept + j, g);
        }
        V<R> h = g * scale;
        at.write(dgamma + j, at.read(dgamma + j, zero) + g * xhat);
        at.write(dbeta + j, at.read(dbeta + j, zero) + g);
        if (plain(A) == TLU) at.write(dtau + j, at.read(dtau + j, zero) + (d - g));
        return Pair<R>{h, h * xhat};
      });
    }
    return;
  }
  R *part = t[SUM], *part_x = t[SQUARE];
  std::fill(sum_h, sum_h + u.width, 0.0);
  std::fill(sum_hx, sum_hx + u.width, 0.0);
  for (i64 from = 0; from < k.bc; from += CHUNK) {
    std::fill(part, part + u.width, R(0));
    std::fill(part_x, part_x + u.width, R(0));
    for (i64 c = from; c < std::min(from + CHUNK, k.bc); c++) {
      V<R> scale = all<R>(gamma[c]), offset = all<R>(beta[c]), least = all<R>(tau[c]);
      V<R> s0{}, s1{}, s2{};
      const T *v = x + c * k.xc, *w = dy + c * k.gc;
      sweep<R>(u.width, [&](i64 i, auto at) {
        soon(v + k.xc + i), soon(w + k.gc + i); // the next channel's
        V<R> mean = take<R>(mu + i), d = at.read(w + i, zero);
        V<R> xhat = (at.read(v + i, mean) - mean) * take<R>(inverse + i);
        V<R> before = xhat * scale + offset;
        if (added(A)) before += at.read(r + c * k.yc + i, zero);
        V<R> g = slope<A>(before, least, d), h = g * scale;
        put<R>(part + i, take<R>(part + i) + h);
        put<R>(part_x + i, take<R>(part_x + i) + h * xhat);
        s0 += g * xhat, s1 += g;
        if (plain(A) == TLU) s2 += d - g;
      });
      into[u.c + c] += total<R>(s0), into[k.c + u.c + c] += total<R>(s1);
      if (plain(A) == TLU) into[2 * k.c + u.c + c] += total<R>(s2);
    }
    for (i64 i = 0; i < u.width; i++) sum_h[i] += double(part[i]), sum_hx[i] += double(part_x[i]);
  }
}

template <int A, class T, class R>
void gradient_tile(const Job<T, R> &job, const Unit &u, Tile<R> &t, const R *slopes, Out &out) {
  const Call &k = job.k;
  const T *x = u.x<T>(k), *dy = u.dy<T>(k), *r = added(A) ? u.residual<T>(k) : nullptr;
  T *dx = u.out<T>(k, k.dx), *dr = added(A) && k.dr ? u.out<T>(k, k.dr) : nullptr;
  const R *mu = t[MU], *inverse = t[INVERSE], *p1 = t[P1], *mub = t[MUB], *q = t[Q];
  const R *less = t[R0];
  const R *gamma = job.given.gamma + u.c, *beta = job.given.beta + u.c, *tau = job.given.tau + u.c;
  const V<R> zero{};
  if (k.columns) {
    for (i64 i = 0; i < u.width; i++) {
      const T *v = x + i * k.xp, *w = dy + i * k.gp;
      T *to = dx + i * k.yp;
      const R *kept = slopes + i * k.bc;
      V<R> mean = all<R>(mub[i]), a = all<R>(p1[i]), b = all<R>(q[i]), off = all<R>(less[i]);
      bool flows = q[i] != R(0); // else what x holds does not matter, be it NaN
      out.sweep_to<R>(to, k.bc, [&](i64 j, auto at) {
        V<R> g = A == NONE ? at.read(w + j, zero) : at.read(kept + j, zero);
        if (added(A) && dr) at.write(dr + i * k.yp + j, g);
        V<R> through = flows ? (at.read(v + j, zero) - mean) * b : zero;
        at.write(to + j, g * at.read(gamma + j, zero) * a - through - off);
      });
    }
    return;
  }
  for (i64 c = 0; c < k.bc; c++) {
    V<R> scale = all<R>(gamma[c]), offset = all<R>(beta[c]), least = all<R>(tau[c]);
    const T *from = x + c * k.xc, *w = dy + c * k.gc;
    T *to = dx + c * k.yc;
    out.sweep_to<R>(to, u.width, [&](i64 i, auto at) {
      V<R> v = at.read(from + i, zero), b = take<R>(q + i), g = at.read(w + i, zero);
      if (A != NONE) {
        V<R> before = (v - take<R>(mu + i)) * take<R>(inverse + i) * scale + offset;
        if (added(A)) before += at.read(r + c * k.yc + i, zero);
        g = slope<A>(before, least, g);
      }
      if (added(A) && dr) at.write(dr + c * k.yc + i, g);
      V<R> through = (v - take<R>(mub + i)) * b;
      through = b != zero ? through : zero;
      at.write(to + i, g * scale * take<R>(p1 + i) - through - take<R>(less + i));
    });
  }
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

template <int A, class T, class R> void backward(const Job<T, R> &job) {
  const Call &k = job.k;
  i64 width = wide<T>(k, 2), units = units_of(k, width);
  i64 least = k.columns ? (SHORT + width - 1) / width : 1; // units of a piece
  i64 count = std::max<i64>(1, std::min<i64>(PIECES, units / least));
  std::vector<Tile<R>> tiles(omp_get_max_threads(), Tile<R>(width));
  i64 room = k.columns ? (3 * k.c + (A == NONE ? 0 : width * k.bc) + 63) / 64 * 64 : 0;
  std::vector<R> scratch(std::size_t(room * omp_get_max_threads()));
  Parameters all(k.c, count);
  share_out(count, streamed<T>(k, k.dx, width), [&](i64 piece, Out &out) {
    const i64 last = units * (piece + 1) / count;
    Tile<R> &t = tiles[omp_get_thread_num()];
    R *sums = scratch.data() + room * omp_get_thread_num(), *slopes = sums + 3 * k.c;
    double *into = all.of(piece);
    i64 rows = 0;
    if (k.columns) std::fill(sums, slopes, R(0));
    for (i64 index = units * piece / count; index < last; index++) {
      Unit u = unit_of(k, index, width);
      given_tile(job, u, t);
      sums_tile<A>(job, u, t, sums, slopes, into);
      if (k.columns && ((rows += u.width) >= SHORT || index + 1 == last)) {
        for (i64 j = 0; j < 3 * k.c; j++) into[j] += double(sums[j]);
        std::fill(sums, slopes, R(0));
        rows = 0;
      }
      slope_tile(job, u, t);
      if (k.dx) gradient_tile<A>(job, u, t, slopes, out);
    }
  });
  all.template finish<R>(k);
}

int run(const Call &k, int dtype, bool back) noexcept {
  return chosen(k, dtype, [&](auto act, auto element) {
    Job<decltype(element), typename Math<decltype(element)>::type> job(k);
    back ? backward<decltype(act)::value>(job) : forward<decltype(act)::value>(job);
  });
}

} // namespace

EXPORT int normlab_lines_forward(const Call *call, int dtype) noexcept {
  return run(*call, dtype, false);
}
EXPORT int normlab_lines_backward(const Call *call, int dtype) noexcept {
  return run(*call, dtype, true);
}
