// One thread block inverts one matrix W [m][n], m >= n, n <= 128: Gram matrix, Cholesky factor, triangular solves.
//
// The Gram matrix is in registers, its factor in shared memory, and so are as many rows of W, or of the right-hand
// side, as fit. A thread solves for one row of it by itself: between the factorization and the end of the solves nobody
// waits. Power 1/2 repeats that: each step of Halley's iteration to the polar factor is a solve with I + c ZᵀZ.
//
// Every sum is one chain of fused multiply-adds in the order of the rows, or columns, so that a result depends neither
// on the batch beside it nor on how much shared memory there is. What it should cost is in benchmarks/gpu_log.md:
// predicted, it has not run on a GPU yet.
#include <type_traits>

#include "../common/cuda.h"
#include "kernel.h"

namespace tpk {

namespace {

constexpr int largest_order = 128;
constexpr int block_order = 8;  // rows of the factor whose sums a thread keeps in registers
constexpr int warp_lanes = 32;

__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }
__device__ inline float cube_root(float x) { return cbrtf(x); }
__device__ inline double cube_root(double x) { return cbrt(x); }

template <class T>
__device__ inline T larger(T a, T b) {
    return a > b ? a : b;
}

template <class T>
__device__ inline T smaller(T a, T b) {
    return a < b ? a : b;
}

template <class T>
__device__ inline T magnitude(T x) {
    return x < 0 ? -x : x;
}

template <class T>
__device__ inline bool is_finite(T x) {
    return x - x == 0;
}

// 16 bytes of neighbours.
template <class T>
struct Pack;
template <>
struct Pack<float> {
    static constexpr int count = 4;
    float of[4];
    __device__ explicit Pack(const float* at) {
        const float4 v = *reinterpret_cast<const float4*>(at);
        of[0] = v.x, of[1] = v.y, of[2] = v.z, of[3] = v.w;
    }
};
template <>
struct Pack<double> {
    static constexpr int count = 2;
    double of[2];
    __device__ explicit Pack(const double* at) {
        const double2 v = *reinterpret_cast<const double2*>(at);
        of[0] = v.x, of[1] = v.y;
    }
};

// The threads of a block as a square over the K × K Gram matrix: each has every side-th row and column.
template <int K>
struct Square {
    static constexpr int side = K == 32 ? 8 : 16, each = K / side, threads = side * side;
};

// Where everything is in shared memory, in numbers.
template <class T>
struct SharedLayout {
    int order, rows;  // n, padded to whole sides of the square; rows of Z at a time, whole warps

    // The distance between columns: 16 bytes more than the rows, so that 8 of them are in different banks.
    __host__ __device__ int stride() const { return rows + static_cast<int>(16 / sizeof(T)); }
    __host__ __device__ int factor() const { return order * (order + block_order) / 2; }
    __host__ __device__ int size() const { return factor() + order * stride() + 2 * order + 8; }
};

template <class T>
struct Workspace {
    // Row r and column k <= r of the Cholesky factor at [r/8 … r/8 + 1)(column k)(r % 8): 8 rows of a column are
    // neighbours. The diagonal is inverted.
    T* factor;
    T* z;        // [order][stride]: a column of Z is contiguous
    T* columns;  // two, of order numbers
    T* of_warps;
    int order, rows, stride;

    __device__ Workspace(const SharedLayout<T>& layout, float4* memory)
        : factor(reinterpret_cast<T*>(memory)),
          z(factor + layout.factor()),
          columns(z + layout.order * layout.stride()),
          of_warps(columns + 2 * layout.order),
          order(layout.order),
          rows(layout.rows),
          stride(layout.stride()) {}

    // Column 0 of 8 rows of the factor.
    __device__ T* block(int first) const { return factor + first * (first + block_order) / 2; }
};

struct Sum {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

struct Largest {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return larger(a, b);
    }
};

// Of the numbers of all threads, the same bits in each.
template <int threads, class T, class Operation>
__device__ T over_block(T value, const Workspace<T>& s, Operation operation) {
#pragma unroll
    for (int mask = warp_lanes / 2; mask > 0; mask /= 2)
        value = operation(value, __shfl_xor_sync(0xffffffffu, value, mask));
    __syncthreads();  // the last one's numbers have been read
    if (threadIdx.x % warp_lanes == 0) s.of_warps[threadIdx.x / warp_lanes] = value;
    __syncthreads();
    value = s.of_warps[0];
#pragma unroll
    for (int warp = 1; warp < threads / warp_lanes; ++warp) value = operation(value, s.of_warps[warp]);
    return value;
}

template <int threads, class T>
__device__ bool all_of_block(bool mine, const Workspace<T>& s) {
    return over_block<threads>(T(mine ? 0 : 1), s, Largest()) == 0;
}

// f(row, column) for each element of a matrix by one of the threads; those of a warp go along what adjoins in memory.
template <int threads, class F>
__device__ void for_elements(ptrdiff_t rows, int columns, bool columns_adjoin, F f) {
    const int lane = static_cast<int>(threadIdx.x) % warp_lanes, warp = static_cast<int>(threadIdx.x) / warp_lanes;
    const ptrdiff_t outer = columns_adjoin ? rows : columns, inner = columns_adjoin ? columns : rows;
    for (ptrdiff_t o = warp; o < outer; o += threads / warp_lanes)
        for (ptrdiff_t i = lane; i < inner; i += warp_lanes)
            columns_adjoin ? f(o, static_cast<int>(i)) : f(i, static_cast<int>(o));
}

// Rows [first, first + rows) of a matrix of `end` rows and n columns, element by element from get(row, column); zero
// outside.
template <int threads, class T, class Get>
__device__ void load(const Workspace<T>& s, ptrdiff_t first, ptrdiff_t end, int n, bool columns_adjoin, Get get) {
    for_elements<threads>(s.rows, s.order, columns_adjoin, [&](ptrdiff_t row, int column) {
        s.z[column * s.stride + row] = column < n && first + row < end ? get(first + row, column) : T(0);
    });
}

// A thread's part of ZᵀZ, of which only blocks on or below the diagonal are computed.
template <class T, int K>
struct Gram {
    using S = Square<K>;
    T of[S::each][S::each];
    int x, y;  // the thread's place

    __device__ Gram() : x(static_cast<int>(threadIdx.x) % S::side), y(static_cast<int>(threadIdx.x) / S::side) {}
    __device__ int row(int i) const { return y + S::side * i; }
    __device__ int column(int j) const { return x + S::side * j; }

    // f(element, row, column, how often the element is in the whole matrix)
    template <class F>
    __device__ void each(F f) {
#pragma unroll
        for (int i = 0; i < S::each; ++i)
#pragma unroll
            for (int j = 0; j <= i; ++j) f(of[i][j], row(i), column(j), i == j ? 1 : 2);
    }

    __device__ void clear() {
        each([](T& element, int, int, int) { element = 0; });
    }

    // What `count` rows of Z contribute, one after the other.
    __device__ void add(const Workspace<T>& s, int count) {
        using P = Pack<T>;
        for (int k = 0; k < count; k += P::count) {
            T right[S::each][P::count];
#pragma unroll
            for (int j = 0; j < S::each; ++j) {
                if (S::side * j >= s.order) continue;
                const P pack(&s.z[column(j) * s.stride + k]);
#pragma unroll
                for (int v = 0; v < P::count; ++v) right[j][v] = pack.of[v];
            }
#pragma unroll
            for (int i = 0; i < S::each; ++i) {
                if (S::side * i >= s.order) continue;
                const P left(&s.z[row(i) * s.stride + k]);
#pragma unroll
                for (int j = 0; j <= i; ++j)
#pragma unroll
                    for (int v = 0; v < P::count; ++v) of[i][j] = fused(left.of[v], right[j][v], of[i][j]);
            }
        }
    }

    // The Cholesky factor of scale G + diag(shift … shift, 1 … 1), the ones beyond n. Column by column: one barrier,
    // and a multiple of the column is subtracted from all later ones. Whether it is numerically positive definite.
    __device__ bool factor(const Workspace<T>& s, int n, T scale, T shift) {
        each([&](T& element, int row, int column, int) {
            element = fused(scale, element, row != column ? T(0) : row < n ? shift : T(1));
        });
        const int thread = static_cast<int>(threadIdx.x);
        bool positive = true;
#pragma unroll
        for (int block = 0; block < S::each; ++block) {
            if (S::side * block >= s.order) continue;
            for (int k = S::side * block; k < S::side * (block + 1); ++k) {
                T* const pivots = s.columns + k % 2 * s.order;
                if (column(block) == k) {
#pragma unroll
                    for (int i = block; i < S::each; ++i)
                        if (S::side * i < s.order) pivots[row(i)] = of[i][block];
                }
                __syncthreads();
                const T pivot = pivots[k], inverse = T(1) / root(pivot);
                positive = positive && pivot > 0;
                T right[S::each];
#pragma unroll
                for (int j = block; j < S::each; ++j)
                    if (S::side * j < s.order) right[j] = pivots[column(j)] * inverse;
#pragma unroll
                for (int i = block; i < S::each; ++i) {
                    if (S::side * i >= s.order) continue;
                    const T left = pivots[row(i)] * inverse;
#pragma unroll
                    for (int j = block; j <= i; ++j) of[i][j] = fused(-left, right[j], of[i][j]);
                }
                for (int r = thread; r < s.order; r += S::threads)
                    if (r >= k)
                        s.block(r / block_order * block_order)[k * block_order + r % block_order] =
                            r == k ? inverse : pivots[r] * inverse;
            }
        }
        __syncthreads();
        return positive;
    }
};

template <class T>
__device__ inline void read_block(const T* at, T (&numbers)[block_order]) {
#pragma unroll
    for (int first = 0; first < block_order; first += Pack<T>::count) {
        const Pack<T> pack(at + first);
#pragma unroll
        for (int v = 0; v < Pack<T>::count; ++v) numbers[first + v] = pack.of[v];
    }
}

// (L Lᵀ)⁻¹ z of the thread's own row of Z, in place.
template <class T>
__device__ void solve_row(const Workspace<T>& s) {
    T* const z = s.z + threadIdx.x;
    for (int first = 0; first < s.order; first += block_order) {
        const T* const block = s.block(first);
        T y[block_order];
#pragma unroll
        for (int i = 0; i < block_order; ++i) y[i] = z[(first + i) * s.stride];
#pragma unroll 4
        for (int k = 0; k < first; ++k) {
            T column[block_order];
            read_block(block + k * block_order, column);
            const T known = -z[k * s.stride];
#pragma unroll
            for (int i = 0; i < block_order; ++i) y[i] = fused(column[i], known, y[i]);
        }
#pragma unroll
        for (int i = 0; i < block_order; ++i) {
            T column[block_order];
            read_block(block + (first + i) * block_order, column);
            y[i] *= column[i];
#pragma unroll
            for (int later = i + 1; later < block_order; ++later) y[later] = fused(-column[later], y[i], y[later]);
            z[(first + i) * s.stride] = y[i];
        }
    }
    for (int first = s.order - block_order; first >= 0; first -= block_order) {
        const T* const block = s.block(first);
        T x[block_order];
#pragma unroll
        for (int i = 0; i < block_order; ++i) x[i] = z[(first + i) * s.stride];
#pragma unroll
        for (int i = block_order - 1; i >= 0; --i) {
            T column[block_order];
            read_block(block + (first + i) * block_order, column);
#pragma unroll
            for (int later = i + 1; later < block_order; ++later) x[i] = fused(-column[later], x[later], x[i]);
            x[i] *= column[i];
            z[(first + i) * s.stride] = x[i];
        }
#pragma unroll 4
        for (int k = 0; k < first; ++k) {
            T column[block_order];
            read_block(block + k * block_order, column);
            T sum = z[k * s.stride];
#pragma unroll
            for (int i = 0; i < block_order; ++i) sum = fused(-column[i], x[i], sum);
            z[k * s.stride] = sum;
        }
    }
}

// NaN where the inverse is not a good one, in all of it, and what is to blame for that.
template <int threads, class T>
__device__ void judge(T* inverse, ptrdiff_t elements, bool good, bool finite, bool* failed) {
    if (threadIdx.x == 0) *failed = finite && !good;
    if (good && finite) return;
    __syncthreads();  // what others wrote is there
    for (ptrdiff_t i = threadIdx.x; i < elements; i += threads) inverse[i] = static_cast<T>(__int_as_float(0x7fc00000));
}

__device__ inline int padded_count(ptrdiff_t count, int rows) {
    return count < rows ? static_cast<int>((count + 3) / 4 * 4) : rows;
}

template <class T, int K>
__global__ void __launch_bounds__(Square<K>::threads, 1)
    regularized_solve_kernel(const RegularizedSolveCuda<T> f, const SharedLayout<T> layout) {
    constexpr int threads = Square<K>::threads;
    TPK_DYNAMIC_SHARED(memory);
    const Workspace<T> s(layout, memory);
    const ptrdiff_t index = blockIdx.x;
    const int n = static_cast<int>(f.n), own = static_cast<int>(threadIdx.x);
    const T* const weight = f.weight + index * f.weight_strides.matrix;
    const T* const rhs = f.rhs + index * f.rhs_strides.matrix;
    T* const solved = f.solved + index * f.m * f.n;
    bool finite = true, good = true;
    Gram<T, K> gram;
    gram.clear();
    for (ptrdiff_t first = 0; first < f.m; first += s.rows) {
        load<threads>(s, first, f.m, n, f.weight_strides.column == 1, [&](ptrdiff_t row, int column) {
            const T value = weight[row * f.weight_strides.row + column * f.weight_strides.column];
            finite = finite && is_finite(value);
            return value;
        });
        __syncthreads();
        gram.add(s, padded_count(f.m - first, s.rows));
        __syncthreads();
    }
    good = gram.factor(s, n, T(1), f.reg_on_device ? *f.reg_on_device : f.reg);
    for (ptrdiff_t first = 0; first < f.m; first += s.rows) {
        load<threads>(s, first, f.m, n, f.rhs_strides.row == 1, [&](ptrdiff_t row, int column) {
            const T value = rhs[column * f.rhs_strides.row + row * f.rhs_strides.column];
            finite = finite && is_finite(value);
            return value;
        });
        __syncthreads();
        if (own < s.rows && first + own < f.m) {
            solve_row(s);
            for (int j = 0; j < n; ++j) {
                const T value = s.z[j * s.stride + own];
                good = good && is_finite(value);
                solved[j * f.m + first + own] = value;
            }
        }
        __syncthreads();
    }
    finite = all_of_block<threads>(finite, s);
    good = all_of_block<threads>(good, s);
    judge<threads>(solved, f.m * f.n, good, finite, f.failed + index);
}

// The rational step x (a + b x²)/(1 + c x²) that maps [l, 1] closest to 1: a dynamically weighted step of Halley's.
template <class T>
struct HalleyStep {
    T a, b, c;

    __device__ explicit HalleyStep(T l) {
        const T square = l * l, d = cube_root(4 * (1 - square)) / cube_root(square * square), s = root(1 + d);
        a = s + root(8 - 4 * d + 8 * (2 - square) / (square * s)) / 2;
        b = (a - 1) * (a - 1) / 4;
        c = a + b - 1;
    }
    __device__ T operator()(T x) const { return x * (a + b * x * x) / (1 + c * x * x); }
};

// Halley's iteration from Z = [W; √r I] over a bound of its largest singular value. X, the first m rows of Z, is
// transposed in `polar` from the start, the other n in `scratch`.
template <class T, int K>
__global__ void __launch_bounds__(Square<K>::threads, 1)
    regularized_polar_kernel(const RegularizedPolarCuda<T> f, const SharedLayout<T> layout) {
    constexpr int threads = Square<K>::threads;
    // Weights for smaller l would be faster, at a condition number 1 + c of more than 41 of what is factored.
    constexpr T smallest_end = T(0.1);
    TPK_DYNAMIC_SHARED(memory);
    const Workspace<T> s(layout, memory);
    const ptrdiff_t index = blockIdx.x, m = f.m, height = f.m + f.n;
    const int n = static_cast<int>(f.n), own = static_cast<int>(threadIdx.x);
    const T* const weight = f.weight + index * f.weight_strides.matrix;
    T* const polar = f.polar + index * m * n;
    T* const rest = f.scratch + index * n * n;
    const T below = root(f.reg_on_device ? *f.reg_on_device : f.reg);
    const auto element = [&](ptrdiff_t row, int column) {
        return weight[row * f.weight_strides.row + column * f.weight_strides.column];
    };
    const bool columns_adjoin = f.weight_strides.column == 1;

    // In the unit of the largest element no square over- or underflows.
    T unit = below;
    bool finite = true;
    for_elements<threads>(m, n, columns_adjoin, [&](ptrdiff_t row, int column) {
        const T value = element(row, column);
        unit = larger(unit, magnitude(value));
        finite = finite && is_finite(value);
    });
    unit = over_block<threads>(unit, s, Largest());
    finite = all_of_block<threads>(finite, s);
    const T side = below / unit;

    Gram<T, K> gram;
    bool last = false;
    // Portion by portion: `fill` puts Z into shared memory, `change` is given the thread's own row, a column of the
    // transpose, and then there is the Gram matrix of what they left.
    const auto pass = [&](auto fill, auto change) {
        gram.clear();
        for (ptrdiff_t first = 0; first < height; first += s.rows) {
            fill(first);
            const ptrdiff_t row = first + own;
            if (own < s.rows && row < height) change(row < m ? polar + row : rest + row - m, row < m ? m : f.n);
            if (last) continue;
            __syncthreads();
            gram.add(s, padded_count(height - first, s.rows));
            __syncthreads();
        }
    };
    pass(
        [&](ptrdiff_t first) {
            load<threads>(s, first, height, n, columns_adjoin, [&](ptrdiff_t row, int column) {
                return row < m ? element(row, column) / unit : row - m == column ? side : T(0);
            });
            __syncthreads();
        },
        [&](T* column, ptrdiff_t distance) {
            for (int j = 0; j < n; ++j) column[j * distance] = s.z[j * s.stride + own];
        });

    // ‖G‖_F, or ‖G - I‖_F
    const auto norm = [&](T identity) {
        T sum = 0;
        gram.each([&](T& g, int row, int column, int times) {
            const T off = row == column && row < n ? g - identity : g;
            sum += times * off * off;
        });
        return root(over_block<threads>(sum, s, Sum()));
    };
    T shrink = 1 / (root(norm(0)) * T(1.001));  // of the first step: no singular value is above 1
    T l = larger(side * shrink, sizeof(T) == 4 ? T(1e-7) : T(1e-16));
    bool positive = finite;
    for (int count = 0; positive && !last && count < f.most; ++count) {
        last = count > 0 && norm(1) < f.tolerance;
        const HalleyStep<T> step(last ? T(1) : larger(smaller(l, T(1)), smallest_end));
        positive = gram.factor(s, n, step.c * shrink * shrink, T(1));
        const T kept = step.b / step.c * shrink, solved = (step.a - step.b / step.c) * shrink;
        pass(
            [&](ptrdiff_t first) {
                if (own >= s.rows) return;
                const ptrdiff_t row = first + own;
                const T* const column = row < m ? polar + row : rest + row - m;
                const ptrdiff_t distance = row < m ? m : f.n;
                for (int j = 0; j < s.order; ++j)
                    s.z[j * s.stride + own] = j < n && row < height ? column[j * distance] : T(0);
            },
            [&](T* column, ptrdiff_t distance) {
                solve_row(s);
                for (int j = 0; j < n; ++j) {
                    T& z = s.z[j * s.stride + own];
                    z = fused(kept, column[j * distance], solved * z);
                    column[j * distance] = z;
                }
            });
        l = step(l);
        shrink = 1;
    }
    judge<threads>(polar, m * n, positive && last, finite, f.failed + index);
}

template <int K>
using Order = std::integral_constant<int, K>;

template <class Run>
void for_order(ptrdiff_t n, Run run) {
    if (n <= 32)
        run(Order<32>{});
    else if (n <= 64)
        run(Order<64>{});
    else
        run(Order<largest_order>{});
}

// As many of `height` rows at a time as there are threads, or as fit; 0 where not even a warp's fit.
template <class T>
SharedLayout<T> layout_of(int n, ptrdiff_t height, int side, int threads, ptrdiff_t limit) {
    const ptrdiff_t whole = (height + warp_lanes - 1) / warp_lanes * warp_lanes;
    SharedLayout<T> layout = {(n + side - 1) / side * side, static_cast<int>(whole < threads ? whole : threads)};
    while (layout.rows > 0 && layout.size() * static_cast<ptrdiff_t>(sizeof(T)) > limit) layout.rows -= warp_lanes;
    return layout;
}

template <class T, class Run>
void run_on(const char* what, ptrdiff_t batch, ptrdiff_t m, ptrdiff_t n, ptrdiff_t height, int device, Run run) {
    if (m < n) throw std::invalid_argument(std::string(what) + ": m must be at least n");
    if (batch > 0x7fffffff) throw std::invalid_argument(std::string(what) + ": too many matrices for one launch");
    const OnDevice on_device(device);
    const int largest = regularized_inverse_cuda_largest<T>(device);
    if (n > largest)
        throw std::invalid_argument(std::string(what) + ": n must be at most " + std::to_string(largest) + ", got " +
                                    std::to_string(n));
    if (batch * n == 0) return;
    for_order(n, [&](auto K) {
        using S = Square<K.value>;
        const auto layout = layout_of<T>(static_cast<int>(n), height, S::side, S::threads,
                                         static_cast<ptrdiff_t>(shared_memory(device)));
        run(K, S::threads, layout, layout.size() * static_cast<ptrdiff_t>(sizeof(T)));
    });
}

}  // namespace

template <class T>
int regularized_inverse_cuda_largest(int device) {
    using S = Square<largest_order>;
    int n = largest_order;
    while (layout_of<T>(n, warp_lanes, S::side, S::threads, static_cast<ptrdiff_t>(shared_memory(device))).rows == 0)
        --n;
    return n;
}

template <class T>
void regularized_solve_cuda(const RegularizedSolveCuda<T>& f, int device, void* stream) {
    constexpr const char* what = "regularized_solve";
    run_on<T>(what, f.batch, f.m, f.n, f.m, device, [&](auto K, int threads, SharedLayout<T> layout, ptrdiff_t bytes) {
        launch_with_shared(what, regularized_solve_kernel<T, K.value>, f.batch, threads, static_cast<size_t>(bytes),
                           stream, f, layout);
    });
}

template <class T>
void regularized_polar_cuda(const RegularizedPolarCuda<T>& f, int device, void* stream) {
    constexpr const char* what = "regularized_polar";
    const ptrdiff_t height = f.m + f.n;
    run_on<T>(what, f.batch, f.m, f.n, height, device,
              [&](auto K, int threads, SharedLayout<T> layout, ptrdiff_t bytes) {
                  launch_with_shared(what, regularized_polar_kernel<T, K.value>, f.batch, threads,
                                     static_cast<size_t>(bytes), stream, f, layout);
              });
}

template int regularized_inverse_cuda_largest<float>(int);
template int regularized_inverse_cuda_largest<double>(int);
template void regularized_solve_cuda(const RegularizedSolveCuda<float>&, int, void*);
template void regularized_solve_cuda(const RegularizedSolveCuda<double>&, int, void*);
template void regularized_polar_cuda(const RegularizedPolarCuda<float>&, int, void*);
template void regularized_polar_cuda(const RegularizedPolarCuda<double>&, int, void*);

}  // namespace tpk
