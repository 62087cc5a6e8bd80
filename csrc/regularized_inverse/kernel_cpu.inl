// One thread a matrix, or a team for a large one: Gram matrix, Cholesky factor and two triangular solves, all by the
// blocked micro-kernel of gemm.h. Rows are padded to whole vectors, so that no product has a remainder.

#include "../common/interrupt.h"
#include "../common/matrix.h"
#include "../common/memory.h"
#include "../common/threads.h"
#include "interleaved_cpu.inl"
#include "kernel.h"

namespace tpk::TPK_ISA {

enum class Triangle { lower, upper };

// Solves with an R × R diagonal block of U (upper: U X = B) or of its transpose (lower: Uᵀ X = B) for V vectors of
// columns, in place and in registers.
template <class T, Triangle triangle, int R, int V>
void solve_block(const T* factor, ptrdiff_t stride, const T* inverse_diagonal, T* x, ptrdiff_t x_row) {
    using Lane = Vec<T>;
    constexpr int L = lanes<T>;
    Lane row[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) row[i][v] = load<Lane>(x + i * x_row + v * L);
#pragma GCC unroll 16
    for (int step = 0; step < R; ++step) {
        const int i = triangle == Triangle::lower ? step : R - 1 - step;
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) row[i][v] *= broadcast<Lane>(inverse_diagonal[i]);
#pragma GCC unroll 16
        for (int later = step + 1; later < R; ++later) {  // what row i contributes to the rows still to be solved
            const int p = triangle == Triangle::lower ? later : R - 1 - later;
            const Lane value =
                broadcast<Lane>(triangle == Triangle::lower ? factor[i * stride + p] : factor[p * stride + i]);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) row[p][v] -= value * row[i][v];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) store(x + i * x_row + v * L, row[i][v]);
}

template <class T>
using SolveFunction = void (*)(const T*, ptrdiff_t, const T*, T*, ptrdiff_t);

template <class T, Triangle triangle, int R = block_rows, int V = block_vectors(R)>
inline SolveFunction<T> solve_function(int rows, int vectors) {
    if constexpr (R > 1) {
        if (rows < R) return solve_function<T, triangle, R - 1>(rows, vectors);
    }
    if constexpr (V > 1) {
        if (vectors < V) return solve_function<T, triangle, R, V - 1>(rows, vectors);
    }
    return solve_block<T, triangle, R, V>;
}

template <class T, Triangle triangle>
void solve_rows(const T* factor, ptrdiff_t stride, const T* inverse_diagonal, ptrdiff_t rows, T* x, ptrdiff_t x_row,
                ptrdiff_t columns) {
    const ptrdiff_t most = block_vectors(static_cast<int>(rows)) * lanes<T>;
    for (ptrdiff_t j = 0; j < columns; j += most) {
        const ptrdiff_t width = columns - j < most ? columns - j : most;
        solve_function<T, triangle>(static_cast<int>(rows), static_cast<int>(width / lanes<T>))(
            factor, stride, inverse_diagonal, x + j, x_row);
    }
}

// Factors a block of up to block_rows rows, block_rows apart, in its upper triangle. False: a pivot is not positive, or
// NaN.
template <class T>
bool factor_block(T* block, ptrdiff_t rows, T* inverse_diagonal) {
    // Rows beyond the last are those of the identity: with loops of fixed length the block stays in registers.
    for (ptrdiff_t i = rows; i < block_rows; ++i)
        for (ptrdiff_t j = 0; j <= i; ++j) block[j * block_rows + i] = j == i ? T(1) : T(0);
    T u[block_rows][block_rows];
    bool positive = true;
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; ++i)
#pragma GCC unroll 8
        for (int j = i; j < block_rows; ++j) u[i][j] = block[i * block_rows + j];
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; ++i) {
        positive = positive && u[i][i] > 0;
        const T scale = 1 / root(u[i][i]);
#pragma GCC unroll 8
        for (int j = i; j < block_rows; ++j) u[i][j] *= scale;
#pragma GCC unroll 8
        for (int p = i + 1; p < block_rows; ++p)
#pragma GCC unroll 8
            for (int j = p; j < block_rows; ++j) u[p][j] -= u[i][p] * u[i][j];
        if (i < rows) inverse_diagonal[i] = scale;
    }
#pragma GCC unroll 8
    for (int i = 0; i < block_rows; ++i)
#pragma GCC unroll 8
        for (int j = i; j < block_rows; ++j) block[i * block_rows + j] = u[i][j];
    return positive;
}

// Rows that are brought up to date together: what they need of the rows before is read once for all of them.
constexpr ptrdiff_t outer_rows = 64;

// G = UᵀU in place: the upper triangle becomes U. False: G is not numerically positive definite, or interrupted.
template <class T>
bool cholesky(const Rows<T>& gram, ptrdiff_t n, T* inverse_diagonal) {
    // Rows [first, first + rows) less what rows [from, from + count) contribute, in the columns from the diagonal on;
    // those between the vector's start and the diagonal are computed along and never used.
    const auto subtract = [&](ptrdiff_t first, ptrdiff_t rows, ptrdiff_t from, ptrdiff_t count) {
        const ptrdiff_t start = first / lanes<T> * lanes<T>;
        multiply<T, Into::subtract>(gram[from] + first, 1, gram.stride, rows, gram.from(from, start), count,
                                    gram.columns - start, gram[first] + start, gram.stride);
    };
    for (ptrdiff_t outer = 0; outer < n; outer += outer_rows) {
        if (interrupted()) return false;
        const ptrdiff_t end = smaller(n, outer + outer_rows);
        subtract(outer, end - outer, 0, outer);
        for (ptrdiff_t first = outer; first < end; first += block_rows) {
            const ptrdiff_t rows = smaller(end - first, block_rows);
            subtract(first, rows, outer, first - outer);
            // The block's factor, apart: with it, one solve gives the block's rows of U, diagonal block included.
            T block[block_rows * block_rows];
            for (ptrdiff_t i = 0; i < rows; ++i)
                for (ptrdiff_t j = i; j < rows; ++j) block[i * block_rows + j] = gram[first + i][first + j];
            if (!factor_block(block, rows, inverse_diagonal + first)) return false;
            const ptrdiff_t start = first / lanes<T> * lanes<T>;
            solve_rows<T, Triangle::lower>(block, block_rows, inverse_diagonal + first, rows, gram[first] + start,
                                           gram.stride, gram.columns - start);
        }
    }
    return true;
}

// UᵀU X = B in place.
template <class T>
void solve(const Rows<T>& factor, ptrdiff_t n, const T* inverse_diagonal, const Rows<T>& x) {
    for (ptrdiff_t outer = 0; outer < n; outer += outer_rows) {
        if (interrupted()) return;
        const ptrdiff_t end = smaller(n, outer + outer_rows);
        const auto subtract = [&](ptrdiff_t first, ptrdiff_t rows, ptrdiff_t from, ptrdiff_t count) {
            multiply<T, Into::subtract>(factor[from] + first, 1, factor.stride, rows, x.from(from, 0), count, x.columns,
                                        x[first], x.stride);
        };
        subtract(outer, end - outer, 0, outer);
        for (ptrdiff_t first = outer; first < end; first += block_rows) {
            const ptrdiff_t rows = smaller(end - first, block_rows);
            subtract(first, rows, outer, first - outer);
            solve_rows<T, Triangle::lower>(factor[first] + first, factor.stride, inverse_diagonal + first, rows,
                                           x[first], x.stride, x.columns);
        }
    }
    for (ptrdiff_t outer = (n - 1) / outer_rows * outer_rows; outer >= 0; outer -= outer_rows) {
        if (interrupted()) return;
        const ptrdiff_t end = smaller(n, outer + outer_rows);
        const auto subtract = [&](ptrdiff_t first, ptrdiff_t rows, ptrdiff_t from, ptrdiff_t count) {
            multiply<T, Into::subtract>(factor[first] + from, factor.stride, 1, rows, x.from(from, 0), count, x.columns,
                                        x[first], x.stride);
        };
        subtract(outer, end - outer, end, n - end);
        for (ptrdiff_t first = outer + (end - outer - 1) / block_rows * block_rows; first >= outer;
             first -= block_rows) {
            const ptrdiff_t rows = smaller(end - first, block_rows);
            subtract(first, rows, first + rows, end - first - rows);
            solve_rows<T, Triangle::upper>(factor[first] + first, factor.stride, inverse_diagonal + first, rows,
                                           x[first], x.stride, x.columns);
        }
    }
}

// X = U^{-T}, lower triangular; whole vectors above the diagonal stay untouched but for the first.
template <class T>
void invert_factor(const Rows<T>& factor, ptrdiff_t n, const T* inverse_diagonal, const Rows<T>& x) {
    for (ptrdiff_t i = 0; i < n; ++i)
        for (ptrdiff_t j = 0; j < x.columns; ++j) x[i][j] = j == i ? T(1) : T(0);
    for (ptrdiff_t outer = 0; outer < n; outer += outer_rows) {
        if (interrupted()) return;
        const ptrdiff_t end = smaller(n, outer + outer_rows);
        const auto subtract = [&](ptrdiff_t first, ptrdiff_t rows, ptrdiff_t from, ptrdiff_t count) {
            multiply<T, Into::subtract>(factor[from] + first, 1, factor.stride, rows, x.from(from, 0), count,
                                        padded<T>(from + count), x[first], x.stride);
        };
        subtract(outer, end - outer, 0, outer);
        for (ptrdiff_t first = outer; first < end; first += block_rows) {
            const ptrdiff_t rows = smaller(end - first, block_rows);
            subtract(first, rows, outer, first - outer);
            solve_rows<T, Triangle::lower>(factor[first] + first, factor.stride, inverse_diagonal + first, rows,
                                           x[first], x.stride, padded<T>(first + rows));
        }
    }
}

// The last word on one matrix: NaN in all of a result that is not finite, and whether that is a failure of the
// factorization, which data that is not finite is not: NaN flows through.
template <class T>
void judge(const RegularizedSolve<T>& f, ptrdiff_t index, bool factored) {
    const ptrdiff_t elements = f.m * f.n, first = index * elements;
    const bool solved = factored && is_finite(f.solved + first, elements);
    f.failed[index] =
        !solved && is_finite(f.weight + first, elements) && (!f.rhs || is_finite(f.rhs + first, elements));
    for (ptrdiff_t i = 0; i < elements && !solved; ++i) f.solved[first + i] = T(__builtin_nan(""));
}

// Elements of scratch that one matrix takes.
template <class T>
inline ptrdiff_t solve_scratch(ptrdiff_t m, ptrdiff_t n) {
    const ptrdiff_t columns = padded<T>(n);
    return (m + n) * Rows<T>::stride_of(columns) + n * Rows<T>::stride_of(padded<T>(m)) + columns;
}

// One matrix, by a team of `members` threads of which this is number `member`: each takes a strip of the columns, but
// for the factorization, which the first does alone.
template <class T>
void solve_matrix(const RegularizedSolve<T>& f, ptrdiff_t index, T* scratch, int member, int members) {
    const ptrdiff_t m = f.m, n = f.n;
    const T* weight = f.weight + index * m * n;
    const Rows<T> w(scratch, n), gram(w[m], n), x(gram[n], m);
    T* inverse_diagonal = x[n];
    const auto copy = [](const T* source, ptrdiff_t rows, ptrdiff_t columns, const Rows<T>& target) {
        for (ptrdiff_t i = 0; i < rows; ++i) {
            __builtin_memcpy(target[i], source + i * columns, static_cast<size_t>(columns) * sizeof(T));
            for (ptrdiff_t j = columns; j < target.columns; ++j) target[i][j] = 0;
        }
    };
    const auto strip = [=](ptrdiff_t columns, int number) { return columns / lanes<T> * number / members * lanes<T>; };
    const ptrdiff_t gram_first = strip(gram.columns, member), gram_end = strip(gram.columns, member + 1);
    const ptrdiff_t x_first = strip(x.columns, member), x_end = strip(x.columns, member + 1);
    if (member == 0) copy(weight, m, n, w);
    wait_for_team(members);
    for (ptrdiff_t first = 0; first < n; first += outer_rows) {  // from the diagonal on: the rest is never read
        if (interrupted()) break;
        const ptrdiff_t start = larger(gram_first, first / lanes<T> * lanes<T>);
        if (start < gram_end)
            multiply<T, Into::store>(w[0] + first, 1, w.stride, smaller(outer_rows, n - first), w.from(0, start), m,
                                     gram_end - start, gram[first] + start, gram.stride);
    }
    wait_for_team(members);
    if (member == 0) {
        for (ptrdiff_t i = 0; i < n; ++i) gram[i][i] += f.reg;
        if (f.rhs) {
            copy(f.rhs + index * n * m, n, m, x);
        } else {
            transpose(w, m, n, x);
            for (ptrdiff_t i = 0; i < n; ++i)
                for (ptrdiff_t j = m; j < x.columns; ++j) x[i][j] = 0;
        }
        // Until the end `failed` says whether the factorization did.
        f.failed[index] = !cholesky(gram, n, inverse_diagonal);
    }
    wait_for_team(members);
    bool solved = !f.failed[index];
    if (solved) solve(gram, n, inverse_diagonal, Rows<T>{x[0] + x_first, x_end - x_first, x.stride});
    wait_for_team(members);
    if (member != 0 || interrupted()) return;
    T* out = f.solved + index * n * m;
    for (ptrdiff_t i = 0; i < n && solved; ++i) __builtin_memcpy(out + i * m, x[i], static_cast<size_t>(m) * sizeof(T));
    judge(f, index, solved);
}

// Whether solving as many matrices at once as a vector has lanes is faster than one by one: as long as they stay in the
// second-level cache.
template <class T>
bool worth_interleaving(const RegularizedSolve<T>& f) {
    return interleaved_scratch<T>(f.m, f.n) * static_cast<ptrdiff_t>(sizeof(T)) <= 512 << 10;
}

// False: no memory for the scratch.
template <class T>
bool regularized_solve(const RegularizedSolve<T>& f) {
    if (f.batch == 0) return true;
    constexpr ptrdiff_t worth_a_team = 192;  // order of the Gram matrix
    const bool team = f.batch < f.threads && f.n >= worth_a_team;
    const ptrdiff_t L = lanes<T>, groups = worth_interleaving(f) ? f.batch / L : 0;
    const ptrdiff_t tasks = groups + f.batch - groups * L;  // groups of interleaved matrices, then one matrix each
    const int threads = static_cast<int>(team ? f.threads : smaller(tasks, f.threads));
    const ptrdiff_t single = solve_scratch<T>(f.m, f.n),
                    size = groups ? larger(single, interleaved_scratch<T>(f.m, f.n)) : single;
    Scratch<T> scratch((team ? 1 : threads) * size);
    if (!scratch) return false;
    Interruptible* const call = running_call();
#pragma omp parallel num_threads(threads)
    {
        Listener here(call);
        const int number = thread_number(), count = thread_count();  // of threads, which may be fewer than asked for
        T* own = scratch.get() + (team ? 0 : number * size);
        const int place = count - 1 - number;  // of its share: the largest for the thread that listens for Ctrl-C
        const ptrdiff_t first = team ? 0 : tasks * place / count, end = team ? tasks : tasks * (place + 1) / count;
        for (ptrdiff_t task = first; task < end; ++task) {
            if (!team && interrupted()) break;  // a team comes to its barriers together
            if (task < groups) {
                solve_interleaved(f, task * L, own);
                for (ptrdiff_t index = task * L; index < (task + 1) * L; ++index) judge(f, index, true);
            } else {
                solve_matrix(f, task - groups + groups * L, own, team ? number : 0, team ? count : 1);
                if (team) wait_for_team(count);
            }
        }
    }
    return true;
}

}  // namespace tpk::TPK_ISA
