"""The compiled kernels stay within the memory they are given: a driver under the sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from normlab.kernels import cpu

FOLDER = Path(cpu.__file__).parent

ROOM = """
#include <cstdio>
#include <cstdlib>
#include <random>

// Buffers of exactly the size that a call may touch, some of whole lines of the caches.
template <class T> T *room(std::mt19937 &r, i64 count, bool positive = false) {
  void *memory = nullptr;
  if (posix_memalign(&memory, r() % 2 ? 64 : 16, std::size_t(count) * sizeof(T))) std::abort();
  T *p = static_cast<T *>(memory);
  std::normal_distribution<double> normal(0.2, 1.0);
  for (i64 i = 0; i < count; i++) {
    double v = normal(r);
    if (positive) v = v * v + 0.1;
    if constexpr (sizeof(T) == 2) store(p, i, float(v));
    else p[i] = T(v);
  }
  return p;
}

"""

NORMALIZE = """
template <class T, class R> int once(std::mt19937 &r, int dtype) {
  auto pick = [&](std::initializer_list<i64> from) { return from.begin()[r() % from.size()]; };
  Call k{};
#ifdef STREAMED
  normlab_streamed = r() % 2 ? 0 : 8 << 20;
#endif
  i64 outer = pick({1, 2, 3, 5}), groups = pick({1, 2, 3, 7, 13, 16, 33});
  k.bn = pick({1, 1, 2, 3, 8}), k.bc = pick({1, 1, 2, 5, 16, 17});
  if (LINES) k.bn = 1;
  k.n = outer * k.bn, k.c = groups * k.bc, k.p = pick({1, 1, 2, 3, 7, 15, 16, 17, 49, 64, 131});
  if (r() % 40 == 0) k.p = 9000;
  if (k.n * k.c * k.p > 60000) k.n = k.bn, k.c = k.bc;
  k.columns = r() % 2;
#ifdef GATES
  const bool gated = r() % 5 == 0;
#else
  const bool gated = false;
#endif
  k.act = gated ? GATED : r() % 4, k.shift = r() % 2, k.about_mean = r() % 2, k.scale = r() % 4 > 0;
  k.flags = r() % 2, k.from_batch = r() % 2, k.eps = 1e-5;
  k.power = double(pick({1, 1, 2, 3})) + (r() % 4 ? 0.0 : 0.5), k.factor = 1.25;
  // Strides with gaps between rows and between samples, or none; 0 is an expanded axis.
  auto strides = [&](i64 &sn, i64 &sc, i64 &sp, bool read) {
    i64 &outer = k.columns ? sp : sc, rows = k.columns ? k.p : k.c;
    (k.columns ? sc : sp) = 1;
    i64 length = k.columns ? k.c : k.p;
    outer = length + (r() % 3 ? 0 : 3);
    if (read && r() % 8 == 0) outer = 0;
    sn = rows * outer + (r() % 3 ? 0 : 5);
    if (read && r() % 8 == 0) sn = 0;
    if (k.columns && k.p == 1) sn = sp;
    return (k.n - 1) * sn + (rows - 1) * outer + length;
  };
  bool last = r() % 2;
  k.mn = k.c / k.bc * k.p, k.mg = last ? 1 : k.p, k.mp = last ? k.c / k.bc : 1;
  i64 areas = outer * (k.c / k.bc) * (LINES ? k.p : 1), size = strides(k.xn, k.xc, k.xp, true);
  T *x = room<T>(r, size);
  if (r() % 8 == 0) x[r() % size] = T{};
  T *dy = room<T>(r, strides(k.gn, k.gc, k.gp, true));
  size = strides(k.yn, k.yc, k.yp, false);
  T *y = room<T>(r, size), *dx = room<T>(r, size);
  auto parameter = [&](Flag flag) -> void * { // some of them narrow
    if (sizeof(R) == 8 || r() % 2) return room<R>(r, k.c);
    k.flags |= flag;
    return room<bf16>(r, k.c);
  };
  void *gamma = parameter(GAMMA), *beta = parameter(BETA), *tau = parameter(TAU);
  R *mean = room<R>(r, areas), *moment = room<R>(r, areas, true);
  auto slope = [&](Flag flag) -> void * {
    return k.flags & flag ? static_cast<void *>(room<bf16>(r, k.c)) : room<R>(r, k.c);
  };
  void *s0 = slope(GAMMA), *s1 = slope(BETA), *s2 = slope(TAU);
  double *s3 = room<double>(r, areas);
  k.x = x, k.dy = dy, k.y = r() % 8 ? y : nullptr, k.dx = r() % 8 ? dx : nullptr;
  k.gamma = r() % 3 ? gamma : nullptr, k.beta = r() % 3 ? beta : nullptr;
  k.tau = with_tau(k.act) ? tau : nullptr, k.mean = mean, k.moment = moment;
  T *add = room<T>(r, size), *dr = room<T>(r, size);
  if (!gated && r() % 2) k.r = add, k.dr = r() % 8 ? dr : nullptr;
  k.dgamma = r() % 4 ? s0 : nullptr, k.dbeta = r() % 4 ? s1 : nullptr, k.dtau = s2;
  k.deps = r() % 2 ? s3 : nullptr;
  const bool corrects = k.bn == k.n && k.bc == 1 && r() % 2 && !gated; // areas are channels
  R *old[] = {room<R>(r, k.c), room<R>(r, k.c, true), room<R>(r, k.c), room<R>(r, k.c)};
  if (corrects) k.old_mean = old[0], k.old_std = old[1], k.corr_r = old[2], k.corr_d = old[3];
  k.rmax = 1.5, k.dmax = 0.5;
  int failed = FORWARD(&k, dtype);
  k.old_mean = k.old_std = nullptr;
  failed |= BACKWARD(&k, dtype);
  for (R *p : old) std::free(p);
  for (void *p : {(void *)x, (void *)dy, (void *)y, (void *)dx, (void *)gamma, (void *)beta,
                  (void *)tau, (void *)mean, (void *)moment, (void *)s0, (void *)s1, (void *)s2,
                  (void *)s3, (void *)add, (void *)dr})
    std::free(p);
  return failed;
}

int main() {
  std::mt19937 r(1);
  float nan = std::nanf(""), bad[] = {nan, INFINITY, -INFINITY, -3e38f, 3e38f};
  for (float u : bad) std::printf("%g ", double(activate<SILU>(floats{} + u, floats{})[0]));
  for (int i = 0; i < 250; i++)
    if (once<float, float>(r, 0) | once<double, double>(r, 1) | once<bf16, float>(r, 2)) return 3;
  Call none{};
  return FORWARD(&none, 9) == 1 ? 0 : 4;
}
"""

UNITS = """
template <class T> int once(std::mt19937 &r, int dtype) {
  auto pick = [&](std::initializer_list<i64> from) { return from.begin()[r() % from.size()]; };
  Rows k{};
  k.units = pick({1, 2, 3, 7, 33}), k.fan_in = pick({1, 2, 3, 7, 15, 16, 17, 131, 1500});
  k.form = r() % 4, k.signs = r() % 3, k.zero = double(r() % 2), k.eps = r() % 2 ? 1e-5 : 0.0;
  k.constant = 1.5;
  i64 all = k.units * k.fan_in;
  T *v = room<T>(r, all), *w = room<T>(r, all), *dv = room<T>(r, all), *dy = room<T>(r, all);
  if (r() % 4 == 0) std::fill(v, v + k.fan_in, T{});
  double *stats = room<double>(r, 4 * k.units);
  k.v = v, k.gain = r() % 2 ? stats : nullptr;
  k.mean = stats + k.units, k.moment = stats + 2 * k.units, k.out = w;
  int failed = normlab_units(&k, dtype, 0);
  k.dy = dy, k.out = r() % 8 ? dv : nullptr, k.dgain = r() % 2 ? stats + 3 * k.units : nullptr;
  failed |= normlab_units(&k, dtype, 1);
  if (dtype != 1) { // two gradients, of which the second has one unit
    i64 units[] = {k.units, 1}, fan_in[] = {k.fan_in, all};
    void *gradient[] = {dy, dv};
    const void *weight[] = {v, w};
    Rewrite c{2, i64(r() % 2), 0.02, 1e-3, units, fan_in, gradient, weight, stats};
    failed |= normlab_rewrite(&c, dtype);
  }
  for (void *p : {(void *)v, (void *)w, (void *)dv, (void *)dy, (void *)stats}) std::free(p);
  return failed;
}

int main() {
  std::mt19937 r(1);
  for (int i = 0; i < 400; i++)
    if (once<float>(r, 0) | once<double>(r, 1) | once<bf16>(r, 2)) return 3;
  Rows none{};
  Rewrite nothing{};
  return normlab_units(&none, 9, 0) == 1 && normlab_rewrite(&nothing, 1) == 1 ? 0 : 4;
}
"""

MAPS = """
template <class T, class R> int once(std::mt19937 &r, int dtype) {
  auto pick = [&](std::initializer_list<i64> from) { return from.begin()[r() % from.size()]; };
  Maps m{};
  normlab_streamed = r() % 2 ? 0 : 8 << 20;
  i64 bc = pick({1, 2, 5, 17});
  m.n = pick({1, 2, 3, 5, 70}), m.c = bc * pick({1, 2, 3, 7, 16});
  m.p = pick({1, 1, 2, 3, 7, 15, 16, 17, 49, 64, 131, 400});
  if (r() % 40 == 0) m.p = 9000, m.n = 1;
  m.columns = r() % 2, m.curve = r() % 2;
  i64 pad = r() % 3 * 2, row = (m.columns ? m.c : m.p) + pad, maps = m.n * m.c;
  m.xn = m.gn = m.yn = row * (m.columns ? m.p : m.c);
  m.xc = m.gc = m.yc = m.columns ? 1 : row, m.xp = m.gp = m.yp = m.columns ? row : 1;
  i64 all = m.n * m.xn - pad, k = m.curve == 0 ? 2 : 5;
  T *x = room<T>(r, all), *dy = room<T>(r, all), *y = room<T>(r, all), *dx = room<T>(r, all);
  R *mean = room<R>(r, maps), *a = room<R>(r, maps), *b = room<R>(r, maps);
  R *v = room<R>(r, maps), *d = room<R>(r, maps, true), *s = room<R>(r, maps, true);
  R *in = room<R>(r, maps), *h = room<R>(r, maps), *sums = room<R>(r, k * maps);
  m.x = x, m.dy = dy, m.mean = mean, m.a = a, m.b = b;
  if (k > 2) m.v = v, m.d = d, m.s = s;
  int failed = 0;
  m.out = y, failed |= normlab_maps(&m, 0, dtype), m.out = nullptr;
  m.sums = sums, failed |= normlab_maps(&m, 1, dtype), m.sums = nullptr;
  m.out = dx, m.k = in, m.h = h, failed |= normlab_maps(&m, 2, dtype);
  // With a middle between moments and coefficients.
  Middle q{};
  q.eps = 1e-5, q.correction = 1.1, q.narrow = sizeof(R) == 4 && r() % 2;
  const i64 parts = m.curve == 0 ? i64(1 + r() % 3) : 1;
  for (i64 i = 0, first = i64(r() % 3); i < parts; i++) q.order |= (1 + (first + i) % 3) << (2 * i);
  std::vector<void *> rooms;
  auto numbers = [&](i64 count, bool there) -> void * {
    if (!there) return nullptr;
    rooms.push_back(q.narrow ? static_cast<void *>(room<bf16>(r, count)) : room<R>(r, count));
    return rooms.back();
  };
  R *batch = room<R>(r, m.c), *spread = room<R>(r, m.c), *kept = room<R>(r, m.c, true);
  q.mean = mean, q.variance = d;
  if (r() % 3 == 0) q.stored_variance = kept, q.stored_mean = m.curve == 0 ? a : nullptr;
  if (r() % 2) q.batch_mean = batch, q.batch_variance = spread;
  q.gamma = numbers(m.c, r() % 3), q.beta = numbers(m.c, r() % 3), q.v = numbers(m.c, m.curve);
  q.mean_logits = numbers(parts, true), q.variance_logits = numbers(parts, true);
  m.out = y, m.dy = nullptr, failed |= normlab_middle(&q, &m, 0, dtype);
  q.batch_mean = q.batch_variance = nullptr;
  q.dgamma = numbers(m.c, r() % 3), q.dbeta = numbers(m.c, r() % 3), q.dv = numbers(m.c, r() % 3);
  q.dmean_logits = numbers(parts, r() % 3), q.dvariance_logits = numbers(parts, r() % 3);
  m.out = r() % 8 ? dx : nullptr, m.dy = dy, failed |= normlab_middle(&q, &m, 1, dtype);
  rooms.insert(rooms.end(), {x, dy, y, dx, mean, a, b, v, d, s, in, h, sums, batch, spread, kept});
  for (void *p : rooms) std::free(p);
  return failed;
}

int main() {
  std::mt19937 r(1);
  float nan = std::nanf(""), bad[] = {nan, INFINITY, -INFINITY, -3e38f, 3e38f, 0.0f, -0.0f};
  for (float u : bad) std::printf("%g ", double(over_sigmoid(floats{} + u)[0]));
  for (int i = 0; i < 250; i++)
    if (once<float, float>(r, 0) | once<double, double>(r, 1) | once<bf16, float>(r, 2)) return 3;
  Maps none{};
  Maps other{};
  other.curve = 9;
  const Middle nothing{};
  if (normlab_middle(&nothing, &other, 0, 0) != 1) return 4;
  return normlab_maps(&none, 0, 9) == 1 && normlab_maps(&none, 9, 0) == 1 ? 0 : 4;
}
"""

STORED = """
template <class R> int once(std::mt19937 &r, int dtype) {
  const i64 n = i64(r() % 70), areas = 1 + i64(r() % 3), all = n * areas;
  R *m0 = room<R>(r, all), *s0 = room<R>(r, n), *m1 = room<R>(r, all), *s1 = room<R>(r, n);
  i64 count = 0;
  const Blend two{n, areas, 0.1, m0, 1.0, s0, m1, 1.5, s1, &count};
  const Blend one{n, 1, 0.9, m0, 1.0, s0, nullptr, 1.0, nullptr, &count};
  int failed = normlab_blend(&two, dtype) | normlab_blend(&one, dtype);
  if (n) {
    m1[all - 1] = R(INFINITY);
    failed |= normlab_blend(&two, dtype) != 3;
  }
  for (R *p : {m0, s0, m1, s1}) std::free(p);
  return failed | (count != 2);
}

int main() {
  std::mt19937 r(1);
  for (int i = 0; i < 300; i++)
    if (once<float>(r, 0) | once<double>(r, 1)) return 3;
  return 0;
}
"""

# Of the sources whose functions take a `Call`.
NAMES = """
#define FORWARD {0}_forward
#define BACKWARD {0}_backward
#define LINES {1}
"""
STREAMED = "#define STREAMED\n"  # those that may store past the caches
DRIVERS = {
    "normalize.cpp": NAMES.format("normlab", 0) + STREAMED + "#define GATES\n" + NORMALIZE,
    "lines.cpp": NAMES.format("normlab_lines", 1) + STREAMED + NORMALIZE,
    "powers.cpp": NAMES.format("normlab_powers", 0) + NORMALIZE,
    "units.cpp": UNITS,
    "maps.cpp": MAPS,
    "stored.cpp": STORED,
}


@pytest.mark.timeout(1200)  # the sanitizers triple what the compiler has to do
@pytest.mark.parametrize(
    ("name", "processor"),
    [*((name, ()) for name in DRIVERS),
     *((name, ("-march=native",)) for name in ("normalize.cpp", "lines.cpp", "maps.cpp"))],
)  # fmt: skip
def test_no_access_outside_of_what_was_given(name, processor, tmp_path):
    """For any processor, and with the vectors of this one, which other code loads and stores."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program, source = tmp_path / "driver", tmp_path / "driver.cpp"
    # The driver follows the kernels in one file, where their names are known.
    source.write_text(f'#include "{FOLDER / name}"\n{ROOM}{DRIVERS[name]}')
    # Half-hearted optimization: -O0 would be slow to run, -O3 slow to build.
    flags = ["-std=c++17", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
             "-fsanitize=float-cast-overflow", "-fno-sanitize-recover=all", *processor]  # fmt: skip
    built = subprocess.run(
        [compiler, *flags, str(source), "-o", str(program)], capture_output=True, text=True
    )
    if built.returncode and processor and "march" in built.stderr:
        pytest.skip("g++ does not know this processor")
    if built.returncode and "san" in built.stderr and "cannot find" in built.stderr:
        pytest.skip("g++ has no sanitizers here")
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=600)
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-4000:])
