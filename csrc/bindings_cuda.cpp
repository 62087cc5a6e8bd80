// tp_kernels._cuda: one function a launcher, taking addresses, sizes, a device and a stream. Python checks and keeps
// the tensors. With TPK_EMULATE, the same for tests, on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "common/cuda.h"
#include "regularized_inverse/kernel.h"
#include "rnn/kernel.h"

using namespace tpk;

namespace {

// run(a number of the dtype)
template <class Run>
auto with_dtype(const std::string& dtype, Run run) {
    if (dtype == "float32") return run(float());
    if (dtype == "bfloat16") return run(bfloat16());
    if (dtype == "float16") return run(float16());
    throw py::value_error("unknown dtype '" + dtype + "'");
}

void rnn_fwd(const std::string& dtype, std::uintptr_t input, const Array3& input_strides, std::uintptr_t weight,
             std::uintptr_t h0, std::uintptr_t h, const Array4& sizes, const std::string& nonlinearity, bool tf32,
             int device, std::uintptr_t stream) {
    with_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        RnnForward<T> f = {};
        f.input = at<const T>(input);
        f.input_strides = strides(input_strides);
        f.weight = at<const T>(weight);
        f.h0 = at<const T>(h0);
        f.h = at<T>(h);
        f.T_ = sizes[0], f.B = sizes[1], f.H = sizes[2], f.N = sizes[3];
        f.nonlinearity = nonlinearity_of(nonlinearity);
        py::gil_scoped_release release;
        rnn_forward_cuda(f, tf32, device, at<void>(stream));
    });
}

void rnn_bwd(const std::string& dtype, std::uintptr_t grad_h, const Array3& grad_h_strides, std::uintptr_t grad_last,
             std::uintptr_t h, std::uintptr_t weight, std::uintptr_t feedback, std::uintptr_t carried_in,
             std::uintptr_t through_in, std::uintptr_t carried_out, std::uintptr_t through_out, std::uintptr_t grad_u,
             std::uintptr_t displacements, std::uintptr_t iterations, std::uintptr_t missed, const Array4& sizes,
             const std::string& nonlinearity, const std::string& inverse, const std::string& update, double step,
             double clip, double reg, double rtol, bool tf32, int device, std::uintptr_t stream) {
    with_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        RnnBackward<T, float> f = {};
        f.grad_h = at<const T>(grad_h);
        f.grad_h_strides = strides(grad_h_strides);
        f.grad_last = at<const T>(grad_last);
        f.h = at<const T>(h);
        f.weight = at<const T>(weight);
        f.feedback = at<const T>(feedback);
        f.carried_in = at<const T>(carried_in);
        f.through_in = at<const T>(through_in);
        f.carried_out = at<T>(carried_out);
        f.through_out = at<T>(through_out);
        f.grad_u = at<T>(grad_u);
        f.iterations = at<std::int32_t>(iterations);
        f.missed = at<float>(missed);
        f.T_ = sizes[0], f.B = sizes[1], f.H = sizes[2], f.N = sizes[3];
        f.nonlinearity = nonlinearity_of(nonlinearity);
        f.inverse = inverse_of(inverse);
        f.update = update_of(update);
        f.step = static_cast<float>(step);
        f.clip = static_cast<float>(clip);
        f.reg = static_cast<float>(reg);
        f.rtol = static_cast<float>(rtol);
        py::gil_scoped_release release;
        rnn_backward_cuda(f, at<float>(displacements), tf32, device, at<void>(stream));
    });
}

bool needs_displacements(const std::string& dtype, const Array4& sizes, const std::string& inverse,
                         const std::string& update, bool tf32, int device) {
    return with_dtype(dtype, [&](auto number) {
        RnnBackward<decltype(number), float> f = {};
        f.T_ = sizes[0], f.B = sizes[1], f.H = sizes[2], f.N = sizes[3];
        f.inverse = inverse_of(inverse);
        f.update = update_of(update);
        return rnn_needs_displacements(f, tf32, device);
    });
}

void rnn_activation(std::uintptr_t h, std::ptrdiff_t count, const std::string& nonlinearity, int device,
                    std::uintptr_t stream) {
    const Nonlinearity a = nonlinearity_of(nonlinearity);
    py::gil_scoped_release release;
    rnn_activation_cuda(at<float>(h), count, a, device, at<void>(stream));
}

// One step of the chain, without products: of the rule, only what happens to a number.
void rnn_step(std::uintptr_t grad_h, const Array3& grad_h_strides, std::uintptr_t grad_last, std::uintptr_t h,
              std::uintptr_t carried_in, std::uintptr_t through_in, std::uintptr_t carried_out, std::uintptr_t grad_u,
              const Array4& sizes, const std::string& nonlinearity, const std::string& inverse,
              const std::string& update, double step, double clip, int device, std::uintptr_t stream) {
    RnnBackward<float> f = {};
    f.grad_h = at<const float>(grad_h);
    f.grad_h_strides = strides(grad_h_strides);
    f.grad_last = at<const float>(grad_last);
    f.h = at<const float>(h);
    f.carried_in = at<const float>(carried_in);
    f.through_in = at<const float>(through_in);
    f.carried_out = at<float>(carried_out);
    f.grad_u = at<float>(grad_u);
    f.T_ = sizes[0], f.B = sizes[1], f.H = sizes[2], f.N = sizes[3];
    f.nonlinearity = nonlinearity_of(nonlinearity);
    f.inverse = inverse_of(inverse);
    f.update = update_of(update);
    f.step = static_cast<float>(step);
    f.clip = static_cast<float>(clip);
    py::gil_scoped_release release;
    rnn_step_cuda(f, device, at<void>(stream));
}

MatrixStrides matrix_strides(const Array3& s) { return {s[0], s[1], s[2]}; }

template <class T>
void solve(std::uintptr_t weight, const Array3& weight_strides, std::uintptr_t rhs, const Array3& rhs_strides,
           double reg, std::uintptr_t reg_on_device, std::uintptr_t solved, std::uintptr_t failed, const Array3& sizes,
           int device, std::uintptr_t stream) {
    const RegularizedSolveCuda<T> f = {at<const T>(weight),
                                       matrix_strides(weight_strides),
                                       at<const T>(rhs),
                                       matrix_strides(rhs_strides),
                                       static_cast<T>(reg),
                                       at<const T>(reg_on_device),
                                       at<T>(solved),
                                       at<bool>(failed),
                                       sizes[0],
                                       sizes[1],
                                       sizes[2]};
    py::gil_scoped_release release;
    regularized_solve_cuda(f, device, at<void>(stream));
}

void regularized_solve(bool is_double, std::uintptr_t weight, const Array3& weight_strides, std::uintptr_t rhs,
                       const Array3& rhs_strides, double reg, std::uintptr_t reg_on_device, std::uintptr_t solved,
                       std::uintptr_t failed, const Array3& sizes, int device, std::uintptr_t stream) {
    (is_double ? solve<double> : solve<float>)(weight, weight_strides, rhs, rhs_strides, reg, reg_on_device, solved,
                                               failed, sizes, device, stream);
}

template <class T>
void polar_factor(std::uintptr_t weight, const Array3& weight_strides, double reg, std::uintptr_t reg_on_device,
                  std::uintptr_t polar, std::uintptr_t scratch, std::uintptr_t failed, const Array3& sizes,
                  double tolerance, int most, int device, std::uintptr_t stream) {
    const RegularizedPolarCuda<T> f = {at<const T>(weight),
                                       matrix_strides(weight_strides),
                                       static_cast<T>(reg),
                                       at<const T>(reg_on_device),
                                       at<T>(polar),
                                       at<T>(scratch),
                                       at<bool>(failed),
                                       sizes[0],
                                       sizes[1],
                                       sizes[2],
                                       static_cast<T>(tolerance),
                                       most};
    py::gil_scoped_release release;
    regularized_polar_cuda(f, device, at<void>(stream));
}

void regularized_polar(bool is_double, std::uintptr_t weight, const Array3& weight_strides, double reg,
                       std::uintptr_t reg_on_device, std::uintptr_t polar, std::uintptr_t scratch,
                       std::uintptr_t failed, const Array3& sizes, double tolerance, int most, int device,
                       std::uintptr_t stream) {
    (is_double ? polar_factor<double> : polar_factor<float>)(weight, weight_strides, reg, reg_on_device, polar, scratch,
                                                             failed, sizes, tolerance, most, device, stream);
}

int regularized_inverse_largest(bool is_double, int device) {
    const OnDevice on_device(device);
    return is_double ? regularized_inverse_cuda_largest<double>(device)
                     : regularized_inverse_cuda_largest<float>(device);
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = TPK_COMPILER;
    info["architectures"] = TPK_ARCHITECTURES;
    return info;
}

}  // namespace

PYBIND11_MODULE(TPK_MODULE, m) {
    m.doc() = "CUDA kernels. Takes addresses: call them through tp_kernels, which checks the tensors.";
    m.def("rnn_fwd", &rnn_fwd, py::kw_only(), py::arg("dtype"), py::arg("input"), py::arg("input_strides"),
          py::arg("weight"), py::arg("h0"), py::arg("h"), py::arg("sizes"), py::arg("nonlinearity"), py::arg("tf32"),
          py::arg("device"), py::arg("stream"));
    m.def("rnn_bwd", &rnn_bwd, py::kw_only(), py::arg("dtype"), py::arg("grad_h"), py::arg("grad_h_strides"),
          py::arg("grad_last"), py::arg("h"), py::arg("weight"), py::arg("feedback"), py::arg("carried_in"),
          py::arg("through_in"), py::arg("carried_out"), py::arg("through_out"), py::arg("grad_u"),
          py::arg("displacements"), py::arg("iterations"), py::arg("missed"), py::arg("sizes"), py::arg("nonlinearity"),
          py::arg("inverse"), py::arg("update"), py::arg("step"), py::arg("clip"), py::arg("reg"), py::arg("rtol"),
          py::arg("tf32"), py::arg("device"), py::arg("stream"));
    m.def("rnn_needs_displacements", &needs_displacements,
          "Whether rnn_bwd needs memory for displacements, float32 and in the shape of h.", py::kw_only(),
          py::arg("dtype"), py::arg("sizes"), py::arg("inverse"), py::arg("update"), py::arg("tf32"),
          py::arg("device"));
    m.def("rnn_activation", &rnn_activation, py::kw_only(), py::arg("h"), py::arg("count"), py::arg("nonlinearity"),
          py::arg("device"), py::arg("stream"));
    m.def("rnn_step", &rnn_step, py::kw_only(), py::arg("grad_h"), py::arg("grad_h_strides"), py::arg("grad_last"),
          py::arg("h"), py::arg("carried_in"), py::arg("through_in"), py::arg("carried_out"), py::arg("grad_u"),
          py::arg("sizes"), py::arg("nonlinearity"), py::arg("inverse"), py::arg("update"), py::arg("step"),
          py::arg("clip"), py::arg("device"), py::arg("stream"));
    m.def("regularized_solve", &regularized_solve, py::kw_only(), py::arg("double"), py::arg("weight"),
          py::arg("weight_strides"), py::arg("rhs"), py::arg("rhs_strides"), py::arg("reg"), py::arg("reg_on_device"),
          py::arg("solved"), py::arg("failed"), py::arg("sizes"), py::arg("device"), py::arg("stream"));
    m.def("regularized_polar", &regularized_polar, py::kw_only(), py::arg("double"), py::arg("weight"),
          py::arg("weight_strides"), py::arg("reg"), py::arg("reg_on_device"), py::arg("polar"), py::arg("scratch"),
          py::arg("failed"), py::arg("sizes"), py::arg("tolerance"), py::arg("most"), py::arg("device"),
          py::arg("stream"));
    m.def("regularized_inverse_largest", &regularized_inverse_largest, py::kw_only(), py::arg("double"),
          py::arg("device"), "The order that the device's shared memory holds.");
    m.def("device_problem", &device_problem, "Why no device can be used; empty where one can.");
    m.def("build_info", &build_info);
    py::dict largest;
    largest["float32"] = rnn_cuda_largest<float>;
    largest["bfloat16"] = rnn_cuda_largest<bfloat16>;
    largest["float16"] = rnn_cuda_largest<float16>;
    m.attr("rnn_largest") = largest;  // N on one multiprocessor
    m.def("rnn_cluster_largest", &rnn_cluster_largest, py::arg("device"),
          "The N, of float32, that a cluster of multiprocessors holds; 0 on a device that has none.");
#ifdef TPK_EMULATE
    m.attr("device_type") = "cpu";
    m.def(
        "emulate",
        [](int multiprocessors, bool reversed, int largest_cluster, size_t shared_memory) {
            emulation::settings = {reversed, multiprocessors, largest_cluster, shared_memory};
        },
        py::kw_only(), py::arg("multiprocessors") = 4, py::arg("reversed") = false, py::arg("largest_cluster") = 16,
        py::arg("shared_memory") = 232448);
#else
    m.attr("device_type") = "cuda";
#endif
}
