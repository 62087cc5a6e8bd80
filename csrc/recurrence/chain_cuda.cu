// What is left of a time step where a library multiplies: everything between two products, in one pass over memory.
#include "common_cuda.h"

namespace tpk {

namespace {

constexpr int step_threads = 256;

__global__ void __launch_bounds__(step_threads) rnn_activation_kernel(float* h, ptrdiff_t count, CellName cell) {
    const ptrdiff_t i = ptrdiff_t{blockIdx.x} * step_threads + threadIdx.x;
    if (i < count) h[i] = activation(nonlinearity_of(cell), h[i]);
}

// λ = term + γ g, δ = D (λ + Wᵀδ of the step after), and what the inverse takes of λ.
__global__ void __launch_bounds__(step_threads) rnn_step_kernel(const RecurrenceBackward<float> f) {
    const ptrdiff_t i = ptrdiff_t{blockIdx.x} * step_threads + threadIdx.x, row = i / f.N;
    if (row >= f.B * f.H) return;
    const ptrdiff_t at = row / f.H * f.grad_h_strides.batch + row % f.H * f.grad_h_strides.head + i % f.N;
    float gradient = f.grad_h ? f.step * f.grad_h[at] : 0;
    if (f.grad_last) gradient = fmaf(f.step, f.grad_last[i], gradient);
    const float h = f.h[i], lambda = (f.carried_in ? f.carried_in[i] : 0) + gradient;
    const float mu = lambda + (f.through_in ? f.through_in[i] : 0);
    f.grad_u[i] = through_activation(nonlinearity_of(f.cell), mu, h);
    if (f.carried_out)
        f.carried_out[i] =
            f.inverse == Inverse::layer ? through_inverse(nonlinearity_of(f.cell), lambda, h, f.clip) : lambda;
}

ptrdiff_t step_blocks(const char* what, ptrdiff_t count) {
    const ptrdiff_t blocks = (count + step_threads - 1) / step_threads;
    if (blocks > 0x7fffffff) throw std::invalid_argument(std::string(what) + ": too many units for one launch");
    return blocks;
}

}  // namespace

void chain_activation_cuda(float* h, ptrdiff_t count, CellName cell, int device, void* stream) {
    constexpr const char* what = "chain_activation";
    const OnDevice on_device(device);
    if (count > 0) launch(what, rnn_activation_kernel, step_blocks(what, count), step_threads, stream, h, count, cell);
}

void chain_step_cuda(const RecurrenceBackward<float>& f, int device, void* stream) {
    constexpr const char* what = "chain_step";
    const OnDevice on_device(device);
    const ptrdiff_t count = f.B * f.H * f.N;
    if (count > 0) launch(what, rnn_step_kernel, step_blocks(what, count), step_threads, stream, f);
}

}  // namespace tpk
