// Standardize, scale or center areas of a tensor, with affine and activation, and its gradient.
//
// A tensor is N samples x C channels x P positions, in one of two orders of memory:
//   rows    (n, c) rows of P contiguous elements, at any strides of n and c     ("channels first")
//   columns (n, p) rows of C contiguous elements, at any strides of n and p     ("channels last")
// The input, its gradient's counterpart dy, and the results have strides of their own, so that
// slices and expanded tensors are read where they are.
// An area is a block of `bn` samples and `bc` channels with all their positions: batch norm has
// bn = N, bc = 1; instance norm 1, 1; group norm 1, C/g; layer norm 1, C; ghost batches n, 1.
//
// One family of formulas, for statistics mu (mean) and M (mean of squares about mu or zero):
//   u = (x - s mu) / sqrt(M + eps) * gamma + beta,  y = a(u)
// No torch or Python headers: plain C entry points at the end, called through ctypes.
//
// Moments of a row (or of a piece of a column) are taken in two passes that stay in cache, and
// combined in double by Chan's formula in a fixed order: results do not depend on the number of
// threads.

#include "call.h"
#include "common.h"

namespace {

struct Shape {
  i64 n, c, p;       // samples, channels, positions
  i64 bn, bc;        // samples and channels of an area
  i64 groups() const { return c / bc; }
  i64 areas() const { return n / bn * groups(); }
  i64 area(i64 in, i64 ic) const { return in / bn * groups() + ic / bc; }
  i64 members() const { return bn * bc * p; }
};

// --- rows ------------------------------------------------------------------------------------

constexpr i64 CHUNK = 8192; // elements summed in R before the sum goes to double

template <class T, class R = typename Math<T>::type>
inline void row_moment(const T *x, i64 p, bool centred, double &mean, double &m2) {
  double total = 0, over = 0, squares = 0;
  R mu = 0;
  if (centred) {
    for (i64 from = 0; from < p; from += CHUNK) {
      i64 to = std::min(from + CHUNK, p);
      R sum = 0;
#pragma omp simd reduction(+ : sum)
      for (i64 i = from; i < to; i++) sum += load(x, i);
      total += double(sum);
    }
    mu = R(total / double(p));
  }
  for (i64 from = 0; from < p; from += CHUNK) {
    i64 to = std::min(from + CHUNK, p);
    R left = 0, square = 0;
#pragma omp simd reduction(+ : left, square)
    for (i64 i = from; i < to; i++) {
      R z = load(x, i) - mu;
      left += z;
      square += z * z;
    }
    over += double(left);
    squares += double(square);
  }
  double correction = centred ? over / double(p) : 0.0;
  mean = double(mu) + correction;
  m2 = centred ? std::max(0.0, squares - correction * over) : squares;
}

template <int A, class T, class R = typename Math<T>::type>
inline void row_apply(const T *x, T *y, i64 p, R mu, R a, R b, R tau) {
#pragma omp simd
  for (i64 i = 0; i < p; i++) store(y, i, activate<A, R>((load(x, i) - mu) * a + b, tau));
}

// sums of g, g * (x - mu) and of dy where the threshold holds
template <int A, class T, class R = typename Math<T>::type>
inline void row_sums(const T *x, const T *dy, i64 p, R mu, R a, R b, R tau, double &sg, double &sgx,
                     double &st) {
  sg = sgx = st = 0;
  for (i64 from = 0; from < p; from += CHUNK) {
    i64 to = std::min(from + CHUNK, p);
    R s0 = 0, s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s0, s1, s2)
    for (i64 i = from; i < to; i++) {
      R z = load(x, i) - mu, d = load(dy, i);
      R g = slope<A, R>(z * a + b, tau, d);
      s0 += g;
      s1 += g * z;
      if (A == TLU) s2 += d - g;
    }
    sg += s0, sgx += s1, st += s2;
  }
}

// dx = g * p1 - (x - mub) * k - h
template <int A, class T, class R = typename Math<T>::type>
inline void row_gradient(const T *x, const T *dy, T *dx, i64 p, R mu, R a, R b, R tau, R p1, R mub,
                         R k, R h) {
#pragma omp simd
  for (i64 i = 0; i < p; i++) {
    R v = load(x, i);
    R g = slope<A, R>((v - mu) * a + b, tau, load(dy, i));
    // Where nothing flows through M, what x holds does not matter, be it NaN.
    store(dx, i, g * p1 - (k != R(0) ? (v - mub) * k : R(0)) - h);
  }
}

// --- columns: a piece of `rows` positions of C contiguous channels ---------------------------------

// Rows of a piece, so that it stays in a first-level cache over two passes, and so that sums in R
// stay short.
inline i64 piece_rows(i64 c, i64 size) {
  return std::min<i64>(512, std::max<i64>(4, 16384 / std::max<i64>(1, c * size)));
}

template <class T, class R> struct Columns {
  std::vector<R> mean, left, square;
  std::vector<double> m, m2;
  double count = 0;
  explicit Columns(i64 c) : mean(c), left(c), square(c), m(c), m2(c) {}

  // `stride` elements from one row to the next
  void add(const T *x, i64 stride, i64 rows, i64 c, bool centred) {
    i64 step = piece_rows(c, sizeof(R));
    for (i64 r = 0; r < rows; r += step)
      piece(x + r * stride, stride, std::min(step, rows - r), c, centred);
  }

  void piece(const T *x, i64 stride, i64 rows, i64 c, bool centred) {
    R *mu = mean.data(), *l = left.data(), *q = square.data();
    std::fill(mu, mu + c, R(0));
    std::fill(l, l + c, R(0));
    std::fill(q, q + c, R(0));
    if (centred) {
      for (i64 r = 0; r < rows; r++) {
        const T *row = x + r * stride;
#pragma omp simd
        for (i64 j = 0; j < c; j++) mu[j] += load(row, j);
      }
      R inverse = R(1) / R(rows);
#pragma omp simd
      for (i64 j = 0; j < c; j++) mu[j] *= inverse;
    }
    for (i64 r = 0; r < rows; r++) {
      const T *row = x + r * stride;
#pragma omp simd
      for (i64 j = 0; j < c; j++) {
        R z = load(row, j) - mu[j];
        l[j] += z;
        q[j] += z * z;
      }
    }
    double k = double(rows), total = count + k, share = k / total, both = count * k / total;
    for (i64 j = 0; j < c; j++) {
      double correction = centred ? double(l[j]) / k : 0.0;
      double mine = double(mu[j]) + correction;
      double sq = centred ? std::max(0.0, double(q[j]) - correction * double(l[j])) : double(q[j]);
      double delta = centred ? mine - m[j] : 0.0;
      m[j] += delta * share;
      m2[j] += sq + delta * delta * both;
    }
    count = total;
  }
};

// Elements from one sample, channel and position to the next.
struct Strides {
  i64 n, c, p;
  i64 row(i64 in, i64 ic) const { return in * n + ic * c; }
};

struct Op {
  bool shift;      // whether the mean is subtracted
  bool about_mean; // whether squares are about the mean
  bool scale;      // whether there is a deviation at all
  double eps;
  bool uses_mean() const { return shift || (scale && about_mean); }
};

// Statistics and coefficients of one area.
template <class R> struct Area {
  double mean = 0, moment = 1, inverse = 1;
  void finish(const Op &op, const Moment &m) {
    mean = op.uses_mean() ? m.mean : 0;
    moment = m.m2 / m.count + (op.about_mean || !op.uses_mean() ? 0.0 : mean * mean);
    invert(op);
  }
  void invert(const Op &op) { inverse = op.scale ? 1.0 / std::sqrt(moment + op.eps) : 1.0; }
};

template <class T, class R> struct Job {
  Shape s;
  Strides xs, gs, ys;               // of x, of dy, and of y or dx
  Op op;
  const T *x;
  R *mean, *moment;                 // one each an area
  const R *gamma, *beta, *tau;      // one each a channel, or null
  R weight(i64 c) const { return gamma ? gamma[c] : R(1); }
  R offset(i64 c) const { return beta ? beta[c] : R(0); }
  R threshold(i64 c) const { return tau ? tau[c] : R(0); }

  // u = (x - mu) * a + b for one channel of one area
  void line(const Area<R> &area, i64 c, R &mu, R &a, R &b) const {
    mu = op.shift ? R(area.mean) : R(0);
    a = R(double(weight(c)) * area.inverse);
    double rest = op.shift ? area.mean - double(mu) : 0.0;
    b = R(double(offset(c)) - rest * double(a));
  }
  Area<R> given(i64 index) const {
    Area<R> area;
    area.mean = op.uses_mean() ? double(mean[index]) : 0.0;
    area.moment = op.scale ? double(moment[index]) : 1.0;
    area.invert(op);
    return area;
  }
  void keep(i64 index, const Area<R> &area) {
    if (op.uses_mean()) mean[index] = R(area.mean);
    if (op.scale) moment[index] = R(area.moment);
  }
};

constexpr i64 BLOCK = 4 << 20; // bytes that stay in a shared cache between two passes
constexpr i64 RUN = 32 << 10;  // bytes of a run that a prefetcher can follow

// Channels taken together where areas span samples.
template <class T> i64 block_channels(const Shape &s) {
  if (s.bn == 1) return s.bc;
  i64 row = s.p * i64(sizeof(T));
  i64 most = std::max<i64>(1, BLOCK / std::max<i64>(1, s.bn * row));
  i64 least = std::max<i64>(1, RUN / std::max<i64>(1, row));
  i64 wanted = std::max(most, least);
  wanted = std::min(wanted, std::max<i64>(1, s.c / std::max(1, omp_get_max_threads())));
  wanted = std::max(wanted / s.bc, i64(1)) * s.bc;
  return std::min(wanted, s.c);
}


template <int A, class T, class R> void apply_row(const Job<T, R> &job, const Area<R> &area, i64 n, i64 c, T *y) {
  R mu, a, b;
  job.line(area, c, mu, a, b);
  row_apply<A, T, R>(job.x + job.xs.row(n, c), y + job.ys.row(n, c), job.s.p, mu, a, b,
                     job.threshold(c));
}

template <int A, class T, class R> void forward_rows(Job<T, R> job, T *y, bool measure) {
  const Shape &s = job.s;
  i64 cb = block_channels<T>(s), blocks = (s.c + cb - 1) / cb, outer = s.n / s.bn;
#pragma omp parallel
  {
    std::vector<Moment> totals;
    std::vector<Area<R>> areas;
#pragma omp for schedule(static)
    for (i64 unit = 0; unit < outer * blocks; unit++) {
      i64 n0 = unit / blocks * s.bn, c0 = unit % blocks * cb, c1 = std::min(c0 + cb, s.c);
      i64 groups = (c1 - c0) / s.bc;
      areas.assign(groups, Area<R>());
      if (measure) {
        totals.assign(groups, Moment());
        for (i64 n = n0; n < n0 + s.bn; n++)
          for (i64 c = c0; c < c1; c++) {
            double mean, m2;
            row_moment(job.x + job.xs.row(n, c), s.p, job.op.uses_mean(), mean, m2);
            totals[(c - c0) / s.bc].add(double(s.p), mean, m2);
          }
        for (i64 g = 0; g < groups; g++) {
          areas[g].finish(job.op, totals[g]);
          job.keep(s.area(n0, c0 + g * s.bc), areas[g]);
        }
      } else {
        for (i64 g = 0; g < groups; g++) areas[g] = job.given(s.area(n0, c0 + g * s.bc));
      }
      if (y) // what was read last is in cache still
        for (i64 n = n0 + s.bn - 1; n >= n0; n--)
          for (i64 c = c0; c < c1; c++) apply_row<A>(job, areas[(c - c0) / s.bc], n, c, y);
    }
  }
}

// What the gradient needs of one area, beside its line: see the formulas in closed_form.py.
template <class R> struct Slope {
  R p1, mub, k, h;
};

template <class T, class R>
Slope<R> slope_of(const Job<T, R> &job, const Area<R> &area, i64 c, double sum_h, double sum_hx,
                  bool from_batch) {
  const Op &op = job.op;
  double m = double(job.s.members()), inside = area.moment + op.eps;
  double p1 = double(job.weight(c)) * area.inverse, k = 0, h = 0;
  if (from_batch) {
    if (op.scale && m == 1 && !op.shift && !op.about_mean)
      p1 *= op.eps / inside; // 1 - x^2/(M + eps) would cancel
    else if (op.scale)
      k = sum_hx / (m * inside);
    if (op.shift) h = sum_h * area.inverse / m;
  }
  return {R(p1), op.about_mean ? R(area.mean) : R(0), R(k), R(h)};
}

// Sums over the samples of an area, for each channel, and their sums over the area.
struct Sums {
  double g = 0, gx = 0, t = 0;
};

template <int A, class T, class R>
void backward_rows(Job<T, R> job, const T *dy, T *dx, std::vector<Sums> &part, double *deps,
                   bool from_batch) {
  const Shape &s = job.s;
  i64 cb = block_channels<T>(s), blocks = (s.c + cb - 1) / cb, outer = s.n / s.bn;
#pragma omp parallel for schedule(static)
  for (i64 unit = 0; unit < outer * blocks; unit++) {
    i64 n0 = unit / blocks * s.bn, c0 = unit % blocks * cb, c1 = std::min(c0 + cb, s.c);
    Sums *mine = part.data() + unit / blocks * s.c;
    for (i64 n = n0; n < n0 + s.bn; n++)
      for (i64 c = c0; c < c1; c++) {
        R mu, a, b;
        job.line(job.given(s.area(n0, c)), c, mu, a, b);
        double g, gx, t;
        row_sums<A, T, R>(job.x + job.xs.row(n, c), dy + job.gs.row(n, c), s.p, mu, a, b,
                          job.threshold(c), g, gx, t);
        mine[c].g += g, mine[c].gx += gx, mine[c].t += t;
      }
    for (i64 c = c0; c < c1; c += s.bc) {
      Area<R> area = job.given(s.area(n0, c));
      double sum_h = 0, sum_hx = 0;
      for (i64 j = c; j < c + s.bc; j++) {
        mine[j].gx *= area.inverse;
        sum_h += double(job.weight(j)) * mine[j].g;
        sum_hx += double(job.weight(j)) * mine[j].gx;
      }
      if (deps) deps[s.area(n0, c)] = -sum_hx / (2 * (area.moment + job.op.eps));
      if (!dx) continue;
      for (i64 n = n0 + s.bn - 1; n >= n0; n--)
        for (i64 j = c; j < c + s.bc; j++) {
          R mu, a, b;
          job.line(area, j, mu, a, b);
          Slope<R> q = slope_of(job, area, j, sum_h, sum_hx, from_batch);
          row_gradient<A, T, R>(job.x + job.xs.row(n, j), dy + job.gs.row(n, j),
                                dx + job.ys.row(n, j), s.p, mu, a, b, job.threshold(j), q.p1,
                                q.mub, q.k, q.h);
        }
    }
  }
}

// --- columns: drivers --------------------------------------------------------------------------

template <class R> struct Lines {
  std::vector<R> mu, a, b, tau, p1, mub, k, h;
  explicit Lines(i64 c) : mu(c), a(c), b(c), tau(c), p1(c), mub(c), k(c), h(c) {}
};

template <int A, class T, class R>
void columns_apply(const T *x, i64 xp, T *y, i64 yp, i64 rows, i64 c, const Lines<R> &l) {
  const R *mu = l.mu.data(), *a = l.a.data(), *b = l.b.data(), *tau = l.tau.data();
  for (i64 r = 0; r < rows; r++) {
    const T *from = x + r * xp;
    T *to = y + r * yp;
#pragma omp simd
    for (i64 j = 0; j < c; j++)
      store(to, j, activate<A, R>((load(from, j) - mu[j]) * a[j] + b[j], tau[j]));
  }
}

template <int A, class T, class R>
void columns_sums(const T *x, i64 xp, const T *dy, i64 gp, i64 rows, i64 c, const Lines<R> &l,
                  R *s0, R *s1, R *s2) {
  const R *mu = l.mu.data(), *a = l.a.data(), *b = l.b.data(), *tau = l.tau.data();
  for (i64 r = 0; r < rows; r++) {
    const T *v = x + r * xp, *w = dy + r * gp;
#pragma omp simd
    for (i64 j = 0; j < c; j++) {
      R z = load(v, j) - mu[j], d = load(w, j);
      R g = slope<A, R>(z * a[j] + b[j], tau[j], d);
      s0[j] += g;
      s1[j] += g * z;
      if (A == TLU) s2[j] += d - g;
    }
  }
}

template <int A, class T, class R>
void columns_gradient(const T *x, i64 xp, const T *dy, i64 gp, T *dx, i64 yp, i64 rows, i64 c,
                      const Lines<R> &l) {
  const R *mu = l.mu.data(), *a = l.a.data(), *b = l.b.data(), *tau = l.tau.data();
  const R *p1 = l.p1.data(), *mub = l.mub.data(), *k = l.k.data(), *h = l.h.data();
  for (i64 r = 0; r < rows; r++) {
    const T *v = x + r * xp, *w = dy + r * gp;
    T *to = dx + r * yp;
#pragma omp simd
    for (i64 j = 0; j < c; j++) {
      R e = load(v, j);
      R g = slope<A, R>((e - mu[j]) * a[j] + b[j], tau[j], load(w, j));
      store(to, j, g * p1[j] - (k[j] != R(0) ? (e - mub[j]) * k[j] : R(0)) - h[j]);
    }
  }
}

// Whether the rows of consecutive samples follow each other at one stride.
inline bool whole(const Shape &s, const Strides &t) { return t.n == s.p * t.p; }

// Calls f(sample, position, rows) for the rows `from` to `to` of the block of samples from n0 on: once
// where the strides make them one matrix, else once a sample.
template <class F>
void runs(const Shape &s, bool whole, i64 n0, i64 from, i64 to, F f) {
  while (from < to) {
    i64 rows = whole ? to - from : std::min(to - from, s.p - from % s.p);
    f(n0 + from / s.p, from % s.p, rows);
    from += rows;
  }
}

// A block of samples is one matrix of bn * P rows. Where areas span samples it is cut into a fixed
// number of pieces, which threads share; else each thread takes whole samples.
constexpr i64 PIECES = 32;
inline i64 pieces_of(const Shape &s) {
  return s.bn == 1 ? 1 : std::max<i64>(1, std::min<i64>(PIECES, s.bn * s.p / 64));
}

template <class T, class R> void columns_lines(const Job<T, R> &job, const std::vector<Area<R>> &areas, Lines<R> &l) {
  for (i64 c = 0; c < job.s.c; c++) {
    job.line(areas[c / job.s.bc], c, l.mu[c], l.a[c], l.b[c]);
    l.tau[c] = job.threshold(c);
  }
}

template <int A, class T, class R> void forward_columns(Job<T, R> job, T *y, bool measure) {
  const Shape &s = job.s;
  i64 rows = s.bn * s.p, outer = s.n / s.bn, parts = pieces_of(s);
  std::vector<Columns<T, R>> found;
  if (s.bn > 1) found.assign(parts, Columns<T, R>(s.c));
  for (i64 first = 0; first < outer; first += s.bn == 1 ? outer : 1) {
    // Areas of single samples: one parallel loop over all. Else: one over the pieces of a block.
    auto settle = [&](i64 block, std::vector<Columns<T, R>> &all, std::vector<Area<R>> &areas) {
      for (i64 g = 0; g < s.groups(); g++) {
        i64 index = block * s.groups() + g;
        if (!measure) {
          areas[g] = job.given(index);
          continue;
        }
        Moment total;
        for (i64 c = g * s.bc; c < (g + 1) * s.bc; c++)
          for (auto &part : all) total.add(part.count, part.m[c], part.m2[c]);
        areas[g].finish(job.op, total);
        job.keep(index, areas[g]);
      }
    };
    if (s.bn == 1) {
#pragma omp parallel
      {
        std::vector<Columns<T, R>> own;
        std::vector<Area<R>> areas(s.groups());
        Lines<R> lines(s.c);
#pragma omp for schedule(static)
        for (i64 n = 0; n < s.n; n++) {
          own.assign(1, Columns<T, R>(s.c));
          if (measure) own[0].add(job.x + n * job.xs.n, job.xs.p, rows, s.c, job.op.uses_mean());
          settle(n, own, areas);
          if (!y) continue;
          columns_lines(job, areas, lines);
          columns_apply<A, T, R>(job.x + n * job.xs.n, job.xs.p, y + n * job.ys.n, job.ys.p, rows,
                                 s.c, lines);
        }
      }
      continue;
    }
    i64 n0 = first * s.bn;
    std::vector<Area<R>> areas(s.groups());
    Lines<R> lines(s.c);
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < parts; i++) {
      if (!measure) continue;
      i64 from = rows * i / parts, to = rows * (i + 1) / parts;
      found[i] = Columns<T, R>(s.c);
      runs(s, whole(s, job.xs), n0, from, to, [&](i64 n, i64 p, i64 count) {
        found[i].add(job.x + n * job.xs.n + p * job.xs.p, job.xs.p, count, s.c, job.op.uses_mean());
      });
    }
    settle(first, found, areas);
    if (!y) continue;
    columns_lines(job, areas, lines);
#pragma omp parallel for schedule(static)
    for (i64 j = 0; j < parts; j++) {
      i64 i = parts - 1 - j, from = rows * i / parts, to = rows * (i + 1) / parts;
      runs(s, whole(s, job.xs) && whole(s, job.ys), n0, from, to, [&](i64 n, i64 p, i64 count) {
        columns_apply<A, T, R>(job.x + n * job.xs.n + p * job.xs.p, job.xs.p,
                               y + n * job.ys.n + p * job.ys.p, job.ys.p, count, s.c, lines);
      });
    }
  }
}

template <class R> struct ColumnSums {
  std::vector<R> r0, r1, r2;
  std::vector<Sums> total;
  explicit ColumnSums(i64 c) : r0(c), r1(c), r2(c), total(c) {}
  template <int A, class T>
  void add(const T *x, i64 xp, const T *dy, i64 gp, i64 rows, i64 c, const Lines<R> &l) {
    i64 step = std::min<i64>(1024, 8 * piece_rows(c, sizeof(R)));
    for (i64 r = 0; r < rows; r += step) {
      std::fill(r0.begin(), r0.end(), R(0));
      std::fill(r1.begin(), r1.end(), R(0));
      std::fill(r2.begin(), r2.end(), R(0));
      columns_sums<A, T, R>(x + r * xp, xp, dy + r * gp, gp, std::min(step, rows - r), c, l,
                            r0.data(), r1.data(), r2.data());
      for (i64 j = 0; j < c; j++)
        total[j].g += double(r0[j]), total[j].gx += double(r1[j]), total[j].t += double(r2[j]);
    }
  }
};

template <int A, class T, class R>
void backward_columns(Job<T, R> job, const T *dy, T *dx, std::vector<Sums> &part, double *deps,
                      bool from_batch) {
  const Shape &s = job.s;
  i64 rows = s.bn * s.p, outer = s.n / s.bn, parts = pieces_of(s);
  auto settle = [&](i64 block, const std::vector<Area<R>> &areas, Lines<R> &l) {
    Sums *mine = part.data() + block * s.c;
    for (i64 g = 0; g < s.groups(); g++) {
      double sum_h = 0, sum_hx = 0;
      for (i64 c = g * s.bc; c < (g + 1) * s.bc; c++) {
        mine[c].gx *= areas[g].inverse;
        sum_h += double(job.weight(c)) * mine[c].g;
        sum_hx += double(job.weight(c)) * mine[c].gx;
      }
      if (deps) deps[block * s.groups() + g] = -sum_hx / (2 * (areas[g].moment + job.op.eps));
      for (i64 c = g * s.bc; c < (g + 1) * s.bc; c++) {
        Slope<R> q = slope_of(job, areas[g], c, sum_h, sum_hx, from_batch);
        l.p1[c] = q.p1, l.mub[c] = q.mub, l.k[c] = q.k, l.h[c] = q.h;
      }
    }
  };
  auto begin = [&](i64 block, std::vector<Area<R>> &areas, Lines<R> &l) {
    for (i64 g = 0; g < s.groups(); g++) areas[g] = job.given(block * s.groups() + g);
    columns_lines(job, areas, l);
  };
  if (s.bn == 1) {
#pragma omp parallel
    {
      std::vector<Area<R>> areas(s.groups());
      Lines<R> l(s.c);
#pragma omp for schedule(static)
      for (i64 n = 0; n < s.n; n++) {
        begin(n, areas, l);
        ColumnSums<R> sums(s.c);
        sums.template add<A, T>(job.x + n * job.xs.n, job.xs.p, dy + n * job.gs.n, job.gs.p, rows,
                                s.c, l);
        std::copy(sums.total.begin(), sums.total.end(), part.begin() + n * s.c);
        settle(n, areas, l);
        if (dx)
          columns_gradient<A, T, R>(job.x + n * job.xs.n, job.xs.p, dy + n * job.gs.n, job.gs.p,
                                    dx + n * job.ys.n, job.ys.p, rows, s.c, l);
      }
    }
    return;
  }
  std::vector<Area<R>> areas(s.groups());
  Lines<R> l(s.c);
  bool joined = whole(s, job.xs) && whole(s, job.gs);
  for (i64 block = 0; block < outer; block++) {
    i64 n0 = block * s.bn;
    begin(block, areas, l);
    std::vector<ColumnSums<R>> sums(parts, ColumnSums<R>(s.c));
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < parts; i++) {
      i64 from = rows * i / parts, to = rows * (i + 1) / parts;
      runs(s, joined, n0, from, to, [&](i64 n, i64 p, i64 count) {
        sums[i].template add<A, T>(job.x + n * job.xs.n + p * job.xs.p, job.xs.p,
                                   dy + n * job.gs.n + p * job.gs.p, job.gs.p, count, s.c, l);
      });
    }
    for (auto &one : sums)
      for (i64 c = 0; c < s.c; c++) {
        Sums &to = part[block * s.c + c];
        to.g += one.total[c].g, to.gx += one.total[c].gx, to.t += one.total[c].t;
      }
    settle(block, areas, l);
    if (!dx) continue;
#pragma omp parallel for schedule(static)
    for (i64 j = 0; j < parts; j++) {
      i64 i = parts - 1 - j, from = rows * i / parts, to = rows * (i + 1) / parts;
      runs(s, joined && whole(s, job.ys), n0, from, to, [&](i64 n, i64 p, i64 count) {
        columns_gradient<A, T, R>(job.x + n * job.xs.n + p * job.xs.p, job.xs.p,
                                  dy + n * job.gs.n + p * job.gs.p, job.gs.p,
                                  dx + n * job.ys.n + p * job.ys.p, job.ys.p, count, s.c, l);
      });
    }
  }
}

template <int A, class T, class R>
void forward(const Job<T, R> &job, T *y, bool measure, bool columns) {
  columns ? forward_columns<A>(job, y, measure) : forward_rows<A>(job, y, measure);
}

template <int A, class T, class R>
void backward(const Job<T, R> &job, const T *dy, T *dx, std::vector<Sums> &part, double *deps,
              bool from_batch, bool columns) {
  columns ? backward_columns<A>(job, dy, dx, part, deps, from_batch)
          : backward_rows<A>(job, dy, dx, part, deps, from_batch);
}

} // namespace

namespace {

template <class T, class R = typename Math<T>::type> Job<T, R> job_of(const Call &k) {
  Shape s{k.n, k.c, k.p, k.bn, k.bc};
  Strides xs{k.xn, k.xc, k.xp}, gs{k.gn, k.gc, k.gp}, ys{k.yn, k.yc, k.yp};
  Op op{k.shift != 0, k.about_mean != 0, k.scale != 0, k.eps};
  auto p = [](const void *q) { return static_cast<const R *>(q); };
  return {s, xs, gs, ys, op, static_cast<const T *>(k.x), static_cast<R *>(k.mean), static_cast<R *>(k.moment),
          p(k.gamma), p(k.beta), p(k.tau)};
}

template <class T> void run_forward(const Call &k) {
  auto job = job_of<T>(k);
  T *y = static_cast<T *>(k.y);
  bool m = k.measure, cols = k.columns;
  switch (k.act) {
  case RELU: return forward<RELU>(job, y, m, cols);
  case SILU: return forward<SILU>(job, y, m, cols);
  case TLU: return forward<TLU>(job, y, m, cols);
  default: return forward<NONE>(job, y, m, cols);
  }
}

template <class T> void run_backward(const Call &k) {
  auto job = job_of<T>(k);
  const T *dy = static_cast<const T *>(k.dy);
  T *dx = static_cast<T *>(k.dx);
  std::vector<Sums> part(k.n / k.bn * k.c);
  bool b = k.from_batch, cols = k.columns;
  switch (k.act) {
  case RELU: backward<RELU>(job, dy, dx, part, k.deps, b, cols); break;
  case SILU: backward<SILU>(job, dy, dx, part, k.deps, b, cols); break;
  case TLU: backward<TLU>(job, dy, dx, part, k.deps, b, cols); break;
  default: backward<NONE>(job, dy, dx, part, k.deps, b, cols);
  }
  for (i64 c = 0; c < k.c; c++) {
    Sums total;
    for (i64 block = 0; block < k.n / k.bn; block++) {
      const Sums &one = part[block * k.c + c];
      total.g += one.g, total.gx += one.gx, total.t += one.t;
    }
    if (k.dgamma) k.dgamma[c] = total.gx;
    if (k.dbeta) k.dbeta[c] = total.g;
    if (k.dtau) k.dtau[c] = total.t;
  }
}

} // namespace

// dtype: 0 float32, 1 float64, 2 bfloat16. Returns 0, or 1 for another dtype, 2 without memory.
EXPORT int normlab_forward(const Call *call, int dtype) noexcept {
  try {
    if (dtype == 0) run_forward<float>(*call);
    else if (dtype == 1) run_forward<double>(*call);
    else if (dtype == 2) run_forward<bf16>(*call);
    else return 1;
    return 0;
  } catch (...) {
    return 2;
  }
}

EXPORT int normlab_backward(const Call *call, int dtype) noexcept {
  try {
    if (dtype == 0) run_backward<float>(*call);
    else if (dtype == 1) run_backward<double>(*call);
    else if (dtype == 2) run_backward<bf16>(*call);
    else return 1;
    return 0;
  } catch (...) {
    return 2;
  }
}

EXPORT int normlab_abi() noexcept { return 3; }
