// tp_kernels._cuda: one function a launcher, taking addresses, sizes, a device and a stream. Python checks and keeps
// the tensors. With TPK_EMULATE, the same for tests, on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "common/cuda.h"
#include "recurrence/call.h"
#include "regularized_inverse/kernel.h"

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

#define TPK_FORWARD_FIELDS(USE) TPK_RECURRENCE_FORWARD(USE, TPK_NO_FIELD, TPK_NO_FIELD)
#define TPK_BACKWARD_FIELDS(USE) TPK_RECURRENCE_BACKWARD(USE, TPK_NO_FIELD, USE, TPK_NO_FIELD)

void check_cell(CellName cell, const char* function) {
    if (cell == CellName::gru)
        throw py::value_error(std::string(function) +
                              ": cell must be 'rnn_tanh', 'rnn_relu' or 'rnn_identity' on a CUDA device, got 'gru'");
}

void recurrence_fwd(const std::string& dtype, const Array4& sizes TPK_FORWARD_FIELDS(TPK_PARAMETER), bool tf32,
                    int device, std::uintptr_t stream) {
    constexpr const char* function = "recurrence_fwd";
    with_dtype(dtype, [&](auto number) {
        auto f = call_of<RecurrenceForward<decltype(number)>>(sizes);
        TPK_FORWARD_FIELDS(TPK_FILL)
        check_cell(f.cell, function);
        py::gil_scoped_release release;
        recurrence_forward_cuda(f, tf32, device, at<void>(stream));
    });
}

void recurrence_bwd(const std::string& dtype, const Array4& sizes TPK_BACKWARD_FIELDS(TPK_PARAMETER),
                    std::uintptr_t displacements, bool tf32, int device, std::uintptr_t stream) {
    constexpr const char* function = "recurrence_bwd";
    with_dtype(dtype, [&](auto number) {
        auto f = call_of<RecurrenceBackward<decltype(number), float>>(sizes);
        TPK_BACKWARD_FIELDS(TPK_FILL)
        check_cell(f.cell, function);
        py::gil_scoped_release release;
        recurrence_backward_cuda(f, at<float>(displacements), tf32, device, at<void>(stream));
    });
}

bool needs_displacements(const std::string& dtype, const Array4& sizes, const std::string& inverse,
                         const std::string& update, bool tf32, int device) {
    constexpr const char* function = "recurrence_needs_displacements";
    return with_dtype(dtype, [&](auto number) {
        auto f = call_of<RecurrenceBackward<decltype(number), float>>(sizes);
        TPK_FILL(Inverse, inverse)
        TPK_FILL(Update, update)
        return recurrence_needs_displacements(f, tf32, device);
    });
}

void chain_activation(const std::string& cell, std::uintptr_t h, std::ptrdiff_t count, int device,
                      std::uintptr_t stream) {
    CellName name;
    fill(name, cell, "chain_activation", "cell");
    check_cell(name, "chain_activation");
    py::gil_scoped_release release;
    chain_activation_cuda(at<float>(h), count, name, device, at<void>(stream));
}

// One step of the chain, without products: of the rule, only what happens to a number.
#define TPK_CHAIN_FIELDS(FIELD)    \
    FIELD(CellName, cell)          \
    FIELD(Input, grad_h)           \
    FIELD(Strides, grad_h_strides) \
    FIELD(Input, grad_last)        \
    FIELD(Input, h)                \
    FIELD(Input, carried_in)       \
    FIELD(Input, through_in)       \
    FIELD(Output, carried_out)     \
    FIELD(Output, grad_u)          \
    FIELD(Inverse, inverse)        \
    FIELD(Update, update)          \
    FIELD(Number, step)            \
    FIELD(Number, clip)

void chain_step(const Array4& sizes TPK_CHAIN_FIELDS(TPK_PARAMETER), int device, std::uintptr_t stream) {
    constexpr const char* function = "chain_step";
    auto f = call_of<RecurrenceBackward<float>>(sizes);
    TPK_CHAIN_FIELDS(TPK_FILL)
    check_cell(f.cell, function);
    py::gil_scoped_release release;
    chain_step_cuda(f, device, at<void>(stream));
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
    m.def("recurrence_fwd", &recurrence_fwd, py::kw_only(), py::arg("dtype"),
          py::arg("sizes") TPK_FORWARD_FIELDS(TPK_KEYWORD), py::arg("tf32"), py::arg("device"), py::arg("stream"));
    m.def("recurrence_bwd", &recurrence_bwd, py::kw_only(), py::arg("dtype"),
          py::arg("sizes") TPK_BACKWARD_FIELDS(TPK_KEYWORD), py::arg("displacements"), py::arg("tf32"),
          py::arg("device"), py::arg("stream"));
    m.def("recurrence_needs_displacements", &needs_displacements,
          "Whether recurrence_bwd needs memory for displacements, float32 and in the shape of h.", py::kw_only(),
          py::arg("dtype"), py::arg("sizes"), py::arg("inverse"), py::arg("update"), py::arg("tf32"),
          py::arg("device"));
    m.def("chain_activation", &chain_activation, py::kw_only(), py::arg("cell"), py::arg("h"), py::arg("count"),
          py::arg("device"), py::arg("stream"));
    m.def("chain_step", &chain_step, py::kw_only(), py::arg("sizes") TPK_CHAIN_FIELDS(TPK_KEYWORD), py::arg("device"),
          py::arg("stream"));
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
    largest["float32"] = recurrence_cuda_largest<float>;
    largest["bfloat16"] = recurrence_cuda_largest<bfloat16>;
    largest["float16"] = recurrence_cuda_largest<float16>;
    m.attr("recurrence_largest") = largest;  // N on one multiprocessor
    m.def("recurrence_cluster_largest", &recurrence_cluster_largest, py::arg("device"),
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
