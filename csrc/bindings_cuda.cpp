// tp_kernels._cuda: one function a launcher, taking addresses, sizes, a device and a stream. Python checks and keeps
// the tensors. With TPK_EMULATE, the same for tests, on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "common/cuda.h"
#include "rnn/kernel.h"

using namespace tpk;

namespace {

void rnn_fwd(std::uintptr_t input, const Array3& input_strides, std::uintptr_t weight, std::uintptr_t h0,
             std::uintptr_t h, const Array4& sizes, const std::string& nonlinearity, int device,
             std::uintptr_t stream) {
    RnnForward<float> f = {};
    f.input = at<const float>(input);
    f.input_strides = strides(input_strides);
    f.weight = at<const float>(weight);
    f.h0 = at<const float>(h0);
    f.h = at<float>(h);
    f.T_ = sizes[0], f.B = sizes[1], f.H = sizes[2], f.N = sizes[3];
    f.nonlinearity = nonlinearity_of(nonlinearity);
    py::gil_scoped_release release;
    rnn_forward_cuda(f, device, at<void>(stream));
}

void rnn_bwd(std::uintptr_t grad_h, const Array3& grad_h_strides, std::uintptr_t grad_last, std::uintptr_t h,
             std::uintptr_t weight, std::uintptr_t feedback, std::uintptr_t carried_in, std::uintptr_t through_in,
             std::uintptr_t carried_out, std::uintptr_t through_out, std::uintptr_t grad_u, std::uintptr_t iterations,
             std::uintptr_t missed, const Array4& sizes, const std::string& nonlinearity, const std::string& inverse,
             const std::string& update, double step, double clip, double reg, double rtol, int device,
             std::uintptr_t stream) {
    RnnBackward<float> f = {};
    f.grad_h = at<const float>(grad_h);
    f.grad_h_strides = strides(grad_h_strides);
    f.grad_last = at<const float>(grad_last);
    f.h = at<const float>(h);
    f.weight = at<const float>(weight);
    f.feedback = at<const float>(feedback);
    f.carried_in = at<const float>(carried_in);
    f.through_in = at<const float>(through_in);
    f.carried_out = at<float>(carried_out);
    f.through_out = at<float>(through_out);
    f.grad_u = at<float>(grad_u);
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
    rnn_backward_cuda(f, device, at<void>(stream));
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
    m.def("rnn_fwd", &rnn_fwd, py::kw_only(), py::arg("input"), py::arg("input_strides"), py::arg("weight"),
          py::arg("h0"), py::arg("h"), py::arg("sizes"), py::arg("nonlinearity"), py::arg("device"), py::arg("stream"));
    m.def("rnn_bwd", &rnn_bwd, py::kw_only(), py::arg("grad_h"), py::arg("grad_h_strides"), py::arg("grad_last"),
          py::arg("h"), py::arg("weight"), py::arg("feedback"), py::arg("carried_in"), py::arg("through_in"),
          py::arg("carried_out"), py::arg("through_out"), py::arg("grad_u"), py::arg("iterations"), py::arg("missed"),
          py::arg("sizes"), py::arg("nonlinearity"), py::arg("inverse"), py::arg("update"), py::arg("step"),
          py::arg("clip"), py::arg("reg"), py::arg("rtol"), py::arg("device"), py::arg("stream"));
    m.def("device_problem", &device_problem, "Why no device can be used; empty where one can.");
    m.def("build_info", &build_info);
    m.attr("rnn_largest") = rnn_cuda_largest;
    m.def("rnn_cluster_largest", &rnn_cluster_largest, py::arg("device"),
          "The N that a cluster of multiprocessors holds; 0 on a device that has none.");
#ifdef TPK_EMULATE
    m.attr("device_type") = "cpu";
    m.def(
        "emulate",
        [](int multiprocessors, bool reversed, int largest_cluster, size_t shared_memory) {
            emulation::settings = {reversed, multiprocessors, largest_cluster, shared_memory};
        },
        py::kw_only(), py::arg("multiprocessors"), py::arg("reversed"), py::arg("largest_cluster"),
        py::arg("shared_memory"));
#else
    m.attr("device_type") = "cuda";
#endif
}
