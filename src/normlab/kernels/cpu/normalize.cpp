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
//   u = (x - s mu) / sqrt(M + eps) * gamma + beta,  y = a(u), or a(u + r) with a residual r
// or with x sigmoid(tau x) for x - s mu.
// No torch or Python headers: plain C entry points at the end, called through ctypes.
//
// Moments are sums of z and z^2, z = x - shift, in one pass, with an element of the area as shift, or 0
// (dots.h); where that lies so far from the mean that digits cancel, in a second pass about the mean. Sums in
// R stay short and go to double in an order that the shape alone gives: results do not depend on
// the number of threads. Working memory is taken before threads start, who could not throw.

#include "blocks.h"
#include "call.h"

namespace {

// --- rows ----------------------------------------------------------------------------------------

// Sums over the samples of a block: `add(run, n, from, count, lanes)` takes `count` elements of a
// run of one sample. Lanes go to double before their sums grow long.
template <class R, class Add>
void walk_rows(const Shape &s, i64 n0, i64 runs, i64 channels, Room<R> &room, int kinds, Add add) {
  const i64 length = channels * s.p, width = kinds * LANES<R>;
  for (int k = 0; k < kinds; k++) std::fill(room.s[k], room.s[k] + runs, 0.0);
  std::fill(room.lanes, room.lanes + runs * width, R(0));
  i64 held = 0;
  auto flush = [&] {
    for (i64 r = 0; r < runs; r++)
      for (int k = 0; k < kinds; k++) {
        R *lanes = room.lanes + r * width + k * LANES<R>;
        room.s[k][r] += total<R>(take<R>(lanes));
        put<R>(lanes, V<R>{});
      }
    held = 0;
  };
  for (i64 n = n0; n < n0 + s.bn; n++)
    for (i64 from = 0; from < length; from += CHUNK) {
      i64 piece = std::min(CHUNK, length - from);
      if (held + piece > CHUNK) flush();
      for (i64 r = 0; r < runs; r++)
        add(r, n, from, piece, room.lanes + r * width);
      held += piece;
    }
  flush();
}

template <class T, class R>
void measure_rows(const Job<T, R> &job, i64 n0, i64 c0, i64 width, i64 first, Room<R> &room) {
  const Shape &s = job.s;
  // Channels that lie one after the other, and belong to one area, are one run.
  const i64 channels = job.xs.c == s.p ? s.bc : 1, areas = width / s.bc, each = s.bc / channels;
  for (i64 g = 0; g < areas; g++)
    room.origin[g] =
        job.op.uses_mean() ? first_origin(job.x, job.xs.row(n0, c0 + g * s.bc)) : R(0);
  for (bool again = true, second = false; again; second = true) {
    walk_rows(s, n0, width / channels, channels, room, 2,
              [&](i64 r, i64 n, i64 from, i64 count, R *lanes) {
                const T *x = job.x + job.xs.row(n, c0 + r * channels) + from;
                run_moments<T, R>(x, count, room.origin[r / each], lanes);
              });
    again = settle(job, first, areas, each, second, room);
  }
}

// Whether a result is stored past the caches: where it is larger than what they hold, and rows follow
// each other, or rows of channels, of which several are stored at once, are whole lines of memory.
template <class T, class R> bool streamed(const Job<T, R> &job, const T *result) {
  return !job.dr && past_caches(result, job.s.n * job.s.c * job.s.p);
}
template <class T, class R> bool streamed_rows(const Job<T, R> &job, const T *result) {
  return streamed(job, result) && job.ys.c == job.s.p;
}
template <class T, class R> bool streamed_columns(const Job<T, R> &job, const T *result) {
  return streamed(job, result) && whole_lines(result, job.s.c | job.ys.n | job.ys.p);
}

// How blocks of channels and of samples are shared out: tasks are the same for any number of
// threads, but for the width of a block, on which no sum depends.
struct Plan {
  i64 width, blocks, stripes, bundles;
};

// Elements of a block whose slopes are kept: all, of one sample, where that is not too much.
inline i64 slopes_kept(const Shape &s, i64 channels) {
  const i64 size = channels * s.p;
  return s.bn == 1 && size <= KEPT ? size : 0;
}

template <class T> Plan plan_rows(const Shape &s) {
  i64 width = block_channels<T>(s), blocks = (s.c + width - 1) / width;
  i64 bundles = std::min(s.n / s.bn, TASKS);
  return {width, blocks, std::min(blocks, std::max<i64>(1, TASKS / bundles)), bundles};
}

// f(bundle, n0, c0, width, room, out) for all blocks, those of one bundle of samples in order.
template <class T, class R, class F>
void blocks_of_rows(const Shape &s, int kinds, bool keep, bool streams, F f) {
  const Plan plan = plan_rows<T>(s);
  const i64 outer = s.n / s.bn;
  std::vector<Room<R>> rooms;
  for (int i = 0; i < omp_get_max_threads(); i++)
    rooms.emplace_back(plan.width, 0, plan.width * kinds * LANES<R>,
                       keep ? slopes_kept(s, plan.width) : 0);
  share_out(plan.bundles * plan.stripes, streams, [&](i64 task, Out &out) {
    const i64 bundle = task / plan.stripes, stripe = task % plan.stripes;
    const i64 from = outer * bundle / plan.bundles, to = outer * (bundle + 1) / plan.bundles;
    const i64 b0 = plan.blocks * stripe / plan.stripes;
    const i64 b1 = plan.blocks * (stripe + 1) / plan.stripes;
    for (i64 o = from; o < to; o++)
      for (i64 b = b0; b < b1; b++) {
        i64 c0 = b * plan.width;
        f(bundle, o * s.bn, c0, std::min(plan.width, s.c - c0), rooms[omp_get_thread_num()], out);
      }
  });
}

template <int A, class T, class R>
void forward_rows(const Job<T, R> &job, T *y, bool measure) {
  const Shape &s = job.s;
  const auto f = [&](i64, i64 n0, i64 c0, i64 width, Room<R> &room, Out &out) {
    const i64 first = s.area(n0, c0), areas = width / s.bc;
    if (measure) measure_rows(job, n0, c0, width, first, room);
    else given(job, first, areas, room);
    if (!y) return;
    lines(job, c0, areas, room);
    for (i64 n = n0 + s.bn - 1; n >= n0; n--) // what was read last is in cache still
      for (i64 j = 0; j < width; j++) {
        const i64 at = job.ys.row(n, c0 + j);
        run_apply<A, T, R>(job.x + job.xs.row(n, c0 + j), along<A>(job.r, at), y + at, s.p, room.l,
                           j, out);
      }
  };
  blocks_of_rows<T, R>(s, 2, false, streamed_rows(job, y), f);
}

template <int A, class T, class R>
void backward_rows(const Job<T, R> &job, const T *dy, T *dx, Totals &totals) {
  const Shape &s = job.s;
  const auto f = [&](i64 bundle, i64 n0, i64 c0, i64 width, Room<R> &room, Out &out) {
    const i64 first = s.area(n0, c0), areas = width / s.bc;
    given(job, first, areas, room);
    lines(job, c0, areas, room);
    if (STRAIGHT<A>) choose_sums(job, areas, false, room);
    walk_rows(s, n0, width, 1, room, 3, [&](i64 j, i64 n, i64 from, i64 count, R *lanes) {
      run_sums<A, T, R>(job.x + job.xs.row(n, c0 + j) + from, dy + job.gs.row(n, c0 + j) + from,
                        along<A>(job.r, job.ys.row(n, c0 + j) + from),
                        room.kept ? room.kept + j * s.p + from : nullptr, count, room.l, j, lanes,
                        room.dots[j / s.bc]);
    });
    slopes(job, c0, areas, first, room);
    totals.add(bundle, c0, width, room.s);
    if (!dx) return;
    for (i64 n = n0 + s.bn - 1; n >= n0; n--)
      for (i64 j = 0; j < width; j++) {
        const i64 at = job.ys.row(n, c0 + j);
        run_gradient<A, T, R>(job.x + job.xs.row(n, c0 + j), dy + job.gs.row(n, c0 + j),
                              along<A>(job.r, at), room.kept ? room.kept + j * s.p : nullptr,
                              dx + at, along<A>(job.dr, at), s.p, room.l, j, out);
      }
  };
  blocks_of_rows<T, R>(s, 3, dear(A), streamed_rows(job, dx), f);
}

// --- columns -------------------------------------------------------------------------------------

constexpr i64 ROWS = 512; // summed in R before the sums go to double

// Puts lines where vectors of T take them.
template <class T, class R> void arrange_lines(const Lines<R> &l, i64 padded) {
  for (R *numbers : {l.mu, l.a, l.b, l.tau}) arrange<T>(numbers, padded);
}
template <class T, class R> void arrange_slopes(const Lines<R> &l, i64 padded) {
  for (R *numbers : {l.p1, l.mub, l.k, l.h}) arrange<T>(numbers, padded);
}

// Sums over rows: `add(from, rows)` adds some to `room.lanes`, where vectors of T put them, and they
// go to `sums`, one after the other for each kind.
template <class T, class R, class Add>
void walk_columns(i64 rows, i64 c, Room<R> &room, int kinds, double *sums, Add add) {
  std::fill(sums, sums + kinds * c, 0.0);
  for (i64 from = 0; from < rows; from += ROWS) {
    std::fill(room.lanes, room.lanes + kinds * room.padded, R(0));
    add(from, std::min(ROWS, rows - from));
    for (int k = 0; k < kinds; k++) {
      const R *lanes = room.lanes + k * room.padded;
      double *to = sums + k * c;
#pragma omp simd
      for (i64 j = 0; j < c; j++) to[j] += double(lanes[place<T>(j)]);
    }
  }
}

// Whether the rows of consecutive samples follow each other at one stride.
inline bool whole(const Shape &s, const Strides &t) { return t.n == s.p * t.p; }

// f(n, p, rows) for `count` rows from `from` on of the samples from n0 on: once where the strides
// make them one matrix, else once a sample.
template <class F> void runs(const Shape &s, bool joined, i64 n0, i64 from, i64 count, F f) {
  while (count > 0) {
    i64 rows = joined ? count : std::min(count, s.p - from % s.p);
    f(n0 + from / s.p, from % s.p, rows);
    from += rows, count -= rows;
  }
}

template <class T, class R>
void measure_columns(const Job<T, R> &job, i64 n0, i64 first, i64 rows, Room<R> &room,
                     const R *shift, double *sums) {
  const Shape &s = job.s;
  R *to = room.lanes;
  const bool dots = DOTTED<T> && std::all_of(shift, shift + room.padded, [](R v) { return v == 0; });
  walk_columns<T>(rows, s.c, room, 2, sums, [&](i64 from, i64 count) {
    runs(s, whole(s, job.xs), n0, first + from, count, [&](i64 n, i64 p, i64 k) {
      const T *x = job.x + job.xs.column(n, p);
      matrix_moments<T, R>(x, job.xs.p, k, s.c, shift, to, to + room.padded, dots);
    });
  });
}

template <int A, class T, class R>
void sums_columns(const Job<T, R> &job, const T *dy, i64 n0, i64 first, i64 rows, Room<R> &room,
                  const Lines<R> &l, bool dots, double *sums) {
  const Shape &s = job.s;
  R *s0 = room.lanes, *s1 = s0 + room.padded, *s2 = s1 + room.padded;
  const bool joined = whole(s, job.xs) && whole(s, job.gs) && (!added(A) || whole(s, job.ys));
  walk_columns<T>(rows, s.c, room, 3, sums, [&](i64 from, i64 count) {
    runs(s, joined, n0, first + from, count, [&](i64 n, i64 p, i64 k) {
      matrix_sums<A, T, R>(job.x + job.xs.column(n, p), job.xs.p, dy + job.gs.column(n, p),
                           job.gs.p, along<A>(job.r, job.ys.column(n, p)), job.ys.p,
                           room.kept ? room.kept + p * s.c : nullptr, k, s.c, l, s0, s1, s2,
                           dots);
    });
  });
}

template <int A, class T, class R>
void apply_columns(const Job<T, R> &job, T *y, i64 n0, i64 first, i64 rows, const Lines<R> &l,
                   Out &out) {
  const Shape &s = job.s;
  runs(s, whole(s, job.xs) && whole(s, job.ys), n0, first, rows, [&](i64 n, i64 p, i64 k) {
    const i64 at = job.ys.column(n, p);
    matrix_apply<A, T, R>(job.x + job.xs.column(n, p), job.xs.p, along<A>(job.r, at), y + at,
                          job.ys.p, k, s.c, l, out);
  });
}

template <int A, class T, class R>
void gradient_columns(const Job<T, R> &job, const T *dy, T *dx, i64 n0, i64 first, i64 rows,
                      const Lines<R> &l, Out &out, const R *kept = nullptr) {
  const Shape &s = job.s;
  const bool joined = whole(s, job.xs) && whole(s, job.gs) && whole(s, job.ys);
  runs(s, joined, n0, first, rows, [&](i64 n, i64 p, i64 k) {
    const i64 at = job.ys.column(n, p);
    matrix_gradient<A, T, R>(job.x + job.xs.column(n, p), job.xs.p, dy + job.gs.column(n, p),
                             job.gs.p, along<A>(job.r, at), kept ? kept + p * s.c : nullptr,
                             dx + at, along<A>(job.dr, at), job.ys.p, k, s.c, l, out);
  });
}

template <class T, class R> void shifts(const Job<T, R> &job, i64 n, Room<R> &room) {
  for (i64 g = 0; g < job.s.groups(); g++)
    room.origin[g] = job.op.uses_mean() ? first_origin(job.x, n * job.xs.n + g * job.s.bc) : R(0);
}
template <class T, class R> void spread_shifts(const Shape &s, Room<R> &room) {
  for (i64 c = 0; c < s.c; c++) room.shift[place<T>(c)] = room.origin[c / s.bc];
}

// Areas of single samples: a thread has whole samples. Areas that span samples are matrices of
// bn * P rows, one after the other, cut into pieces that threads share.
struct Pieces {
  i64 rows, parts;
  explicit Pieces(const Shape &s)
      : rows(s.bn * s.p), parts(std::max<i64>(1, std::min<i64>(TASKS, rows / 64))) {}
  i64 from(i64 i) const { return rows * i / parts; }
  i64 count(i64 i) const { return from(i + 1) - from(i); }
};

template <class R>
std::vector<Room<R>> rooms_of_columns(const Shape &s, int kinds, bool keep = false) {
  std::vector<Room<R>> rooms;
  for (int i = 0; i < omp_get_max_threads(); i++)
    rooms.emplace_back(s.c, kinds, 0, keep ? slopes_kept(s, s.c) : 0);
  return rooms;
}

// f(bundle, n, room, out) for all samples.
template <class R, class F>
void samples_of_columns(const Shape &s, int kinds, bool keep, bool streams, F f) {
  auto rooms = rooms_of_columns<R>(s, kinds, keep);
  const i64 bundles = std::min(s.n, TASKS);
  share_out(bundles, streams, [&](i64 bundle, Out &out) {
    for (i64 n = s.n * bundle / bundles; n < s.n * (bundle + 1) / bundles; n++)
      f(bundle, n, rooms[omp_get_thread_num()], out);
  });
}

// The sums of all pieces, in order.
template <class R>
void gather(const std::vector<double> &found, i64 parts, int kinds, i64 c, Room<R> &to) {
  for (int k = 0; k < kinds; k++) {
    std::fill(to.s[k], to.s[k] + c, 0.0);
    for (i64 i = 0; i < parts; i++) {
      const double *from = found.data() + (i * kinds + k) * c;
#pragma omp simd
      for (i64 j = 0; j < c; j++) to.s[k][j] += from[j];
    }
  }
}

template <int A, class T, class R>
void forward_columns(const Job<T, R> &job, T *y, bool measure) {
  const Shape &s = job.s;
  const i64 c = s.c, groups = s.groups();
  const bool streams = streamed_columns(job, y);
  if (s.bn == 1) {
    samples_of_columns<R>(s, 2, false, streams, [&](i64, i64 n, Room<R> &room, Out &out) {
      if (measure) {
        shifts(job, n, room);
        for (bool again = true, second = false; again; second = true) {
          spread_shifts<T>(s, room);
          measure_columns(job, n, 0, s.p, room, room.shift, room.s[0]);
          again = settle(job, n * groups, groups, s.bc, second, room);
        }
      } else {
        given(job, n * groups, groups, room);
      }
      if (!y) return;
      lines(job, 0, groups, room);
      arrange_lines<T>(room.l, room.padded);
      apply_columns<A>(job, y, n, 0, s.p, room.l, out);
    });
    return;
  }
  const Pieces pieces(s);
  auto rooms = rooms_of_columns<R>(s, 2);
  Room<R> common(c, 0, 0);
  std::vector<double> found(measure ? pieces.parts * 2 * c : 0);
  for (i64 block = 0; block < s.n / s.bn; block++) {
    const i64 n0 = block * s.bn;
    if (measure) {
      shifts(job, n0, common);
      for (bool again = true, second = false; again; second = true) {
        spread_shifts<T>(s, common);
        share(pieces.parts, [&](i64 i) {
          measure_columns(job, n0, pieces.from(i), pieces.count(i), rooms[omp_get_thread_num()],
                          common.shift, found.data() + i * 2 * c);
        });
        gather(found, pieces.parts, 2, c, common);
        again = settle(job, block * groups, groups, s.bc, second, common);
      }
    } else {
      given(job, block * groups, groups, common);
    }
    if (!y) continue;
    lines(job, 0, groups, common);
    arrange_lines<T>(common.l, common.padded);
    share_out(pieces.parts, streams, [&](i64 i, Out &out) {
      const i64 last = pieces.parts - 1 - i; // what was read last is in cache still
      apply_columns<A>(job, y, n0, pieces.from(last), pieces.count(last), common.l, out);
    });
  }
}

template <int A, class T, class R>
void backward_columns(const Job<T, R> &job, const T *dy, T *dx, Totals &totals) {
  const Shape &s = job.s;
  const i64 c = s.c, groups = s.groups();
  const bool streams = streamed_columns(job, dx);
  if (s.bn == 1) {
    samples_of_columns<R>(s, 3, dear(A), streams, [&](i64 bundle, i64 n, Room<R> &room, Out &out) {
      given(job, n * groups, groups, room);
      lines(job, 0, groups, room);
      arrange_lines<T>(room.l, room.padded);
      if (STRAIGHT<A>) choose_sums(job, groups, true, room);
      sums_columns<A>(job, dy, n, 0, s.p, room, room.l, room.dots[0], room.s[0]);
      slopes(job, 0, groups, n * groups, room);
      arrange_slopes<T>(room.l, room.padded);
      totals.add(bundle, 0, c, room.s);
      if (dx) gradient_columns<A>(job, dy, dx, n, 0, s.p, room.l, out, room.kept);
    });
    return;
  }
  const Pieces pieces(s);
  auto rooms = rooms_of_columns<R>(s, 3);
  Room<R> common(c, 0, 0);
  std::vector<double> found(pieces.parts * 3 * c);
  for (i64 block = 0; block < s.n / s.bn; block++) {
    const i64 n0 = block * s.bn;
    given(job, block * groups, groups, common);
    lines(job, 0, groups, common);
    arrange_lines<T>(common.l, common.padded);
    if (STRAIGHT<A>) choose_sums(job, groups, true, common);
    share(pieces.parts, [&](i64 i) {
      sums_columns<A>(job, dy, n0, pieces.from(i), pieces.count(i), rooms[omp_get_thread_num()],
                      common.l, common.dots[0], found.data() + i * 3 * c);
    });
    gather(found, pieces.parts, 3, c, common);
    slopes(job, 0, groups, block * groups, common);
    arrange_slopes<T>(common.l, common.padded);
    totals.add(block % totals.bundles, 0, c, common.s);
    if (!dx) continue;
    share_out(pieces.parts, streams, [&](i64 i, Out &out) {
      const i64 last = pieces.parts - 1 - i;
      gradient_columns<A>(job, dy, dx, n0, pieces.from(last), pieces.count(last), common.l, out);
    });
  }
}

template <class T, class R> Job<T, R> job_of(const Call &k, const Affine<R> &affine) {
  Shape s{k.n, k.c, k.p, k.bn, k.bc};
  Strides xs{k.xn, k.xc, k.xp}, gs{k.gn, k.gc, k.gp}, ys{k.yn, k.yc, k.yp};
  if (k.p == 1) xs.p = xs.n, gs.p = gs.n, ys.p = ys.n; // samples are rows of columns
  Op op{k.shift != 0, k.about_mean != 0, k.scale != 0, k.from_batch != 0, k.act == GATED, k.eps};
  return {s, xs, gs, ys, op, static_cast<const T *>(k.x), static_cast<R *>(k.mean),
          static_cast<R *>(k.moment), affine.gamma, affine.beta, affine.tau, k.deps,
          static_cast<const T *>(k.r), static_cast<T *>(k.dr),
          {static_cast<const R *>(k.old_mean), static_cast<const R *>(k.old_std),
           static_cast<R *>(k.corr_r), static_cast<R *>(k.corr_d), k.rmax, k.dmax}};
}

template <int A, class T> void forward(const Call &k) {
  using R = typename Math<T>::type;
  const Affine<R> affine(k);
  auto job = job_of<T, R>(k, affine);
  T *y = static_cast<T *>(k.y);
  const bool measure = k.flags & MEASURE && (job.op.uses_mean() || job.op.scale);
  in_columns(k) ? forward_columns<A>(job, y, measure) : forward_rows<A>(job, y, measure);
}

template <int A, class T> void backward(const Call &k) {
  using R = typename Math<T>::type;
  const Affine<R> affine(k);
  auto job = job_of<T, R>(k, affine);
  const T *dy = static_cast<const T *>(k.dy);
  T *dx = static_cast<T *>(k.dx);
  Totals totals(std::min(k.n / k.bn, TASKS), k.c);
  in_columns(k) ? backward_columns<A>(job, dy, dx, totals) : backward_rows<A>(job, dy, dx, totals);
  const auto sum = [&](int kind, bool wanted) { return wanted ? totals.sum(kind) : nullptr; };
  const bool corrected = k.corr_r && k.dgamma; // of gamma (x r + d) + beta
  const double *s0 = sum(0, k.dbeta || corrected), *s1 = sum(1, k.dgamma), *s2 = sum(2, k.dtau);
  std::vector<double> both(corrected ? std::size_t(k.c) : 0);
  if (corrected) {
    const R *r = static_cast<const R *>(k.corr_r), *d = static_cast<const R *>(k.corr_d);
    for (i64 c = 0; c < k.c; c++) both[c] = s1[c] * double(r[c]) + s0[c] * double(d[c]);
    s1 = both.data();
  }
  give<R>(k, BETA, s0, k.dbeta), give<R>(k, GAMMA, s1, k.dgamma), give<R>(k, TAU, s2, k.dtau);
}

// f(activation, element), as `chosen`, which has what all kernels have.
template <class F> int run(const Call &k, int dtype, F f) noexcept {
  if (k.act != GATED) return chosen(k, dtype, f);
  return typed(dtype, [&](auto element) {
    f(std::integral_constant<int, GATED>{}, element);
    return 0;
  });
}

} // namespace

EXPORT int normlab_forward(const Call *call, int dtype) noexcept {
  return run(*call, dtype, [&](auto act, auto element) {
    forward<decltype(act)::value, decltype(element)>(*call);
  });
}
EXPORT int normlab_backward(const Call *call, int dtype) noexcept {
  return run(*call, dtype, [&](auto act, auto element) {
    backward<decltype(act)::value, decltype(element)>(*call);
  });
}

// For all kernels of the library, from the next call on.
EXPORT void normlab_stream_from(i64 bytes) noexcept { normlab_streamed = bytes; }

EXPORT int normlab_abi() noexcept { return 11; }
