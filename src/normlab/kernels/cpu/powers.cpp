// Deviations of any order p, with affine and activation, over blocks of samples and channels; the
// orders of memory are those of normalize.cpp. With z = x - b mu and m members of an area,
//   M = mean |z|^p,  D = k (M + eps)^(1/p),  u = (x - s mu) / D * gamma + beta,  y = a(u + r),
//   phi = |z|^(p-1) sign z,
//   dx = h / D - s sum(h) / (m D) - sum(h x-hat) / (m (M + eps)) (phi - b mean phi).
//
// One line of coefficients for each channel of each block of samples. All loops go through `walk`,
// whose sums go from R to double in pieces that the shape alone gives: results do not depend on the
// number of threads. Working memory is taken before threads start, who could not throw.

#include "call.h"

namespace {

constexpr i64 RUN = 2048;   // elements of a row whose sum is in R
constexpr i64 ROWS = 256;   // rows of channels, likewise
constexpr i64 PIECES = 32;  // of the rows of channels of an area

inline float raised(float x, double p) { return std::pow(x, float(p)); }
inline double raised(double x, double p) { return std::pow(x, p); }
#if defined(__GNUC__)
inline floats raised(floats x, double p) {
  for (i64 i = 0; i < LANES<float>; i++) x[i] = raised(x[i], p);
  return x;
}
inline doubles raised(doubles x, double p) {
  for (i64 i = 0; i < LANES<double>; i++) x[i] = raised(x[i], p);
  return x;
}
#endif

template <class X> inline X magnitude(X z) { return z < X{} ? -z : z; }
// |z|^p; p is the same for all, so that the branches cost nothing.
template <class X> inline X power(X z, double p) {
  if (p == 1) return magnitude<X>(z);
  if (p == 2) return z * z;
  if (p == 3) return magnitude<X>(z) * z * z;
  return raised(magnitude<X>(z), p);
}
// |z|^(p-1) sign z, 0 at 0.
template <class X> inline X phi(X z, double p) {
  const X zero{};
  if (p == 1) return z > zero ? zero + 1.0f : (z < zero ? zero - 1.0f : zero);
  if (p == 2) return z;
  if (p == 3) return magnitude<X>(z) * z;
  X size = raised(magnitude<X>(z), p - 1);
  return z < zero ? -size : size;
}

// The coefficient of a line: one for a run of positions, or one each of a run of channels.
template <class R> struct Same {
  i64 line;
  template <class At> V<R> operator()(const std::vector<R> &of, At) const {
    return all<R>(of[line]);
  }
};
template <class R> struct Each {
  i64 line;
  template <class At> V<R> operator()(const std::vector<R> &of, At at) const {
    return at.read(of.data() + line, V<R>{});
  }
};

template <class T, class R> struct Job {
  Call k;
  bool columns;
  i64 blocks, lines;
  double members;
  std::vector<R> mu, a, b, tau, p1, mub, through, less, rest; // one each of a line
  R one[64];                                                  // lanes that there are

  const Affine<R> given;

  explicit Job(const Call &call) : k(call), given(call) {
    columns = in_columns(k);
    if (k.p == 1) k.xp = k.xn, k.gp = k.gn, k.yp = k.yn;
    blocks = k.n / k.bn, lines = blocks * k.c;
    members = double(k.bn) * double(k.bc) * double(k.p);
    for (auto *of : {&mu, &a, &b, &tau, &p1, &mub, &through, &less, &rest}) of->resize(lines);
    std::fill(one, one + 64, R(1));
  }
  const T *x() const { return static_cast<const T *>(k.x); }
  const T *dy() const { return static_cast<const T *>(k.dy); }
  R *means() const { return static_cast<R *>(k.mean); }
  R *moments() const { return static_cast<R *>(k.moment); }
  i64 area(i64 line) const { return line / k.bc; } // blocks of channels follow each other
};

// f(at, coefficient, x, dy, y, sums) for all vectors of elements, by their places in memory; adds to
// K sums, found for each line in `out`, one after the other for each kind.
template <int K, class T, class R, class F>
void walk(const Job<T, R> &job, std::vector<double> &out, F f) {
  const Call &k = job.k;
  const i64 c = k.c, threads = omp_get_max_threads();
  out.assign(std::size_t(K * job.lines), 0.0);
  if (!job.columns) {
    std::vector<double> found(std::size_t(K * k.n * c));
    double *sums = found.data();
    share(k.n * c, [&](i64 row) {
      const i64 n = row / c, j = row % c;
      const Same<R> line{n / k.bn * c + j};
      for (i64 from = 0; from < k.p; from += RUN) {
        V<R> s[K + 1] = {};
        const i64 xi = n * k.xn + j * k.xc + from, gi = n * k.gn + j * k.gc + from;
        const i64 yi = n * k.yn + j * k.yc + from;
        sweep<R>(std::min(RUN, k.p - from),
                 [&](i64 i, auto at) { f(at, line, xi + i, gi + i, yi + i, s); });
        for (int kind = 0; kind < K; kind++) sums[row * K + kind] += total<R>(s[kind]);
      }
    });
    for (i64 row = 0; K > 0 && row < k.n * c; row++)
      for (int kind = 0; kind < K; kind++)
        out[kind * job.lines + row / c / k.bn * c + row % c] += sums[row * K + kind];
    return;
  }
  const i64 rows = k.bn * k.p, parts = std::max<i64>(1, std::min(PIECES, rows / 64));
  const i64 tasks = job.blocks * parts, padded = c + LANES<R>;
  std::vector<double> found(std::size_t(tasks * K * c));
  std::vector<R> room(std::size_t(threads * K * padded));
  share(tasks, [&](i64 task) {
    const i64 block = task / parts, part = task % parts, last = rows * (part + 1) / parts;
    double *sums = found.data() + task * K * c;
    R *lanes = room.data() + omp_get_thread_num() * K * padded;
    for (i64 from = rows * part / parts; from < last; from += ROWS) {
      std::fill(lanes, lanes + K * padded, R(0));
      i64 n = block * k.bn + from / k.p, p = from % k.p;
      for (i64 row = from; row < std::min(from + ROWS, last); row++) {
        const i64 xi = n * k.xn + p * k.xp, gi = n * k.gn + p * k.gp, yi = n * k.yn + p * k.yp;
        sweep<R>(c, [&](i64 j, auto at) {
          V<R> s[K + 1] = {};
          for (int kind = 0; kind < K; kind++) s[kind] = take<R>(lanes + kind * padded + j);
          f(at, Each<R>{block * c + j}, xi + j, gi + j, yi + j, s);
          for (int kind = 0; kind < K; kind++) put<R>(lanes + kind * padded + j, s[kind]);
        });
        if (++p == k.p) p = 0, n++;
      }
      for (int kind = 0; kind < K; kind++)
        for (i64 j = 0; j < c; j++) sums[kind * c + j] += double(lanes[kind * padded + j]);
    }
  });
  for (i64 task = 0; K > 0 && task < tasks; task++)
    for (int kind = 0; kind < K; kind++)
      for (i64 j = 0; j < c; j++)
        out[kind * job.lines + task / parts * c + j] += found[(task * K + kind) * c + j];
}

// The sum over the lines of an area.
inline double pooled(const Call &k, const double *sums, i64 area) {
  double sum = 0;
  for (i64 line = area * k.bc; line < (area + 1) * k.bc; line++) sum += sums[line];
  return sum;
}

template <class T, class R> void measure(Job<T, R> &job) {
  const Call &k = job.k;
  const i64 areas = job.lines / k.bc, groups = k.c / k.bc;
  const T *x = job.x();
  std::vector<double> sums;
  if (k.shift || k.about_mean) {
    for (i64 l = 0; l < job.lines; l++) { // about an element of the area, so that little cancels
      i64 area = job.area(l);
      job.mu[l] = load(x, area / groups * k.bn * k.xn + area % groups * k.bc * k.xc);
    }
    walk<1>(job, sums, [&](auto at, auto of, i64 xi, i64, i64, V<R> *s) {
      V<R> mu = of(job.mu, at);
      s[0] += at.read(x + xi, mu) - mu;
    });
    for (i64 area = 0; area < areas; area++) {
      i64 l = area * k.bc;
      double mean = double(job.mu[l]) + pooled(k, sums.data(), area) / job.members;
      job.means()[area] = R(mean);
      R rest = R(mean - double(R(mean)));
      std::fill(job.rest.begin() + l, job.rest.begin() + l + k.bc, rest);
    }
  }
  for (i64 l = 0; l < job.lines; l++) job.mub[l] = k.about_mean ? job.means()[job.area(l)] : R(0);
  const V<R> zero{};
  const bool rest = k.about_mean;
  walk<1>(job, sums, [&](auto at, auto of, i64 xi, i64, i64, V<R> *s) {
    V<R> mu = of(job.mub, at), z = at.read(x + xi, mu) - mu;
    if (rest) z = z - of(job.rest, at) * at.read(job.one, zero);
    s[0] += power<V<R>>(z, k.power);
  });
  for (i64 area = 0; area < areas; area++)
    job.moments()[area] = R(pooled(k, sums.data(), area) / job.members);
}

inline double deviation(const Call &k, double inside) {
  double root = k.power == 1 ? inside : k.power == 2 ? std::sqrt(inside)
                                                     : std::pow(inside, 1 / k.power);
  return k.factor * root;
}

template <class T, class R> double inside(const Job<T, R> &job, i64 line) {
  return double(job.moments()[job.area(line)]) + job.k.eps;
}

// Coefficients of u = (x - mu) a + b.
template <class T, class R> void lines(Job<T, R> &job) {
  const Call &k = job.k;
  for (i64 l = 0; l < job.lines; l++) {
    double inverse = 1 / deviation(k, inside(job, l));
    job.mu[l] = k.shift ? job.means()[job.area(l)] : R(0);
    const i64 c = l % k.c;
    double a = double(job.given.gamma[c]) * inverse, b = double(job.given.beta[c]);
    if (k.shift && job.rest[l] != R(0)) b -= double(job.rest[l]) * a;
    job.a[l] = R(a), job.b[l] = R(b), job.tau[l] = job.given.tau[c];
  }
}

template <int A, class T, class R> void forward(Job<T, R> &job) {
  const Call &k = job.k;
  if (k.flags & MEASURE) measure(job);
  if (!k.y) return;
  lines(job);
  T *y = static_cast<T *>(k.y);
  const T *r = static_cast<const T *>(k.r);
  std::vector<double> none;
  walk<0>(job, none, [&](auto at, auto of, i64 xi, i64, i64 yi, V<R> *) {
    V<R> mu = of(job.mu, at), u = (at.read(job.x() + xi, mu) - mu) * of(job.a, at) + of(job.b, at);
    if (r) u += at.read(r + yi, V<R>{});
    at.write(y + yi, activate<A>(u, of(job.tau, at)));
  });
}

// Coefficients of dx = g p1 - phi through - less, from sums of g, g (x - mu) and phi; and the
// gradients of gamma, beta, tau and eps.
template <class T, class R> void slopes(Job<T, R> &job, std::vector<double> &sums) {
  const Call &k = job.k;
  const i64 areas = job.lines / k.bc;
  double *g = sums.data(), *gx = g + job.lines, *turn = gx + job.lines, *below = turn + job.lines;
  std::vector<double> sum;
  auto reduced = [&](const double *of, Flag which, void *into, bool scaled) {
    if (!into) return;
    sum.assign(std::size_t(k.c), 0.0);
    for (i64 l = 0; l < job.lines; l++)
      sum[l % k.c] += scaled ? of[l] / deviation(k, inside(job, l)) : of[l];
    give<R>(k, which, sum.data(), into);
  };
  reduced(g, BETA, k.dbeta, false), reduced(gx, GAMMA, k.dgamma, true);
  if (k.act == TLU) reduced(below, TAU, k.dtau, false);
  const bool single = job.members == 1 && !k.shift && !k.about_mean;
  for (i64 area = 0; area < areas; area++) {
    const i64 first = area * k.bc;
    const double in = inside(job, first), inverse = 1 / deviation(k, in);
    double h = 0, hx = 0;
    for (i64 l = first; l < first + k.bc; l++) {
      double gamma = double(job.given.gamma[l % k.c]);
      h += gamma * g[l], hx += gamma * gx[l] * inverse;
    }
    if (k.deps) k.deps[area] = -hx / (k.power * in);
    const double through = k.from_batch && !single ? hx / (job.members * in) : 0;
    double less = k.from_batch && k.shift ? h * inverse / job.members : 0;
    if (k.about_mean && through != 0) less -= through * pooled(k, turn, area) / job.members;
    for (i64 l = first; l < first + k.bc; l++) {
      // Of one member, 1 - |x|^p / (M + eps) would cancel.
      double p1 = double(job.given.gamma[l % k.c]) * inverse;
      job.p1[l] = R(single && k.from_batch ? p1 * k.eps / in : p1);
      job.through[l] = R(through), job.less[l] = R(less);
    }
  }
}

template <int A, class T, class R> void backward(Job<T, R> &job) {
  const Call &k = job.k;
  lines(job);
  for (i64 l = 0; l < job.lines; l++) job.mub[l] = k.about_mean ? job.means()[job.area(l)] : R(0);
  const V<R> zero{};
  const bool turns = k.from_batch && k.about_mean;
  std::vector<double> sums;
  const T *r = static_cast<const T *>(k.r);
  auto gradient = [&](auto at, auto of, V<R> z, i64 gi, i64 yi) {
    V<R> u = z * of(job.a, at) + of(job.b, at);
    if (r) u += at.read(r + yi, zero);
    return slope<A>(u, of(job.tau, at), at.read(job.dy() + gi, zero));
  };
  walk<4>(job, sums, [&](auto at, auto of, i64 xi, i64 gi, i64 yi, V<R> *s) {
    V<R> mu = of(job.mu, at), z = at.read(job.x() + xi, mu) - mu, g = gradient(at, of, z, gi, yi);
    s[0] += g, s[1] += g * z;
    if (turns) {
      V<R> mub = of(job.mub, at);
      s[2] += phi<V<R>>(at.read(job.x() + xi, mub) - mub, k.power);
    }
    if (A == TLU) s[3] += at.read(job.dy() + gi, zero) - g;
  });
  slopes(job, sums);
  if (!k.dx) return;
  T *dx = static_cast<T *>(k.dx), *dr = static_cast<T *>(k.dr);
  walk<0>(job, sums, [&](auto at, auto of, i64 xi, i64 gi, i64 yi, V<R> *) {
    V<R> v = at.read(job.x() + xi, zero), g = gradient(at, of, v - of(job.mu, at), gi, yi);
    if (dr) at.write(dr + yi, g);
    V<R> through = of(job.through, at), d = g * of(job.p1, at) - of(job.less, at);
    // Where nothing flows through M, what x holds does not matter, be it NaN.
    if (k.from_batch) {
      V<R> turn = phi<V<R>>(v - of(job.mub, at), k.power) * through;
      d = d - (through != zero ? turn : zero);
    }
    at.write(dx + yi, d);
  });
}

int run(const Call &k, int dtype, bool back) noexcept {
  Call plain = k; // whether there is a residual is asked in the loops, for half as much code
  plain.r = nullptr;
  return chosen(plain, dtype, [&](auto act, auto element) {
    Job<decltype(element), typename Math<decltype(element)>::type> job(k);
    back ? backward<decltype(act)::value>(job) : forward<decltype(act)::value>(job);
  });
}

} // namespace

EXPORT int normlab_powers_forward(const Call *call, int dtype) noexcept {
  return run(*call, dtype, false);
}
EXPORT int normlab_powers_backward(const Call *call, int dtype) noexcept {
  return run(*call, dtype, true);
}
