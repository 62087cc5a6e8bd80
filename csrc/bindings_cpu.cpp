// tp_kernels._cpu: one function a launcher, taking addresses and sizes. Python checks and keeps the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <new>
#include <string>
#include <vector>

#include "bindings.h"
#include "common/isa.h"

using namespace tpk;

namespace {

template <class T>
const Launchers<T>& launchers() {
    if constexpr (sizeof(T) == sizeof(float))
        return isa_level().single_precision;
    else
        return isa_level().double_precision;
}

template <class Arguments>
void launch(bool (*launcher)(const Arguments&), const Arguments& arguments) {
    py::gil_scoped_release release;
    if (!launcher(arguments)) throw std::bad_alloc();
}

template <class F>
void for_dtype(bool is_double, F f) {
    if (is_double)
        f(double{});
    else
        f(float{});
}

void rnn_fwd(bool is_double, std::uintptr_t input, const Array3& input_strides, std::uintptr_t projection,
             std::uintptr_t bias, std::ptrdiff_t projected, std::uintptr_t weight, std::uintptr_t h0, std::uintptr_t h,
             const Array4& sizes, const std::string& nonlinearity, int threads) {
    for_dtype(is_double, [&](auto zero) {
        using T = decltype(zero);
        launch(launchers<T>().rnn_forward,
               RnnForward<T>{at<const T>(input), strides(input_strides), at<const T>(projection), at<const T>(bias),
                             projected, at<const T>(weight), at<const T>(h0), at<T>(h), sizes[0], sizes[1], sizes[2],
                             sizes[3], nonlinearity_of(nonlinearity), threads});
    });
}

// Where the solve of "jacobian" gave up, (step, sample, head, relative residual); None where it did not.
py::object rnn_bwd(bool is_double, std::uintptr_t grad_h, const Array3& grad_h_strides, std::uintptr_t grad_last,
                   std::uintptr_t h, std::uintptr_t weight, std::uintptr_t feedback, std::uintptr_t carried_in,
                   std::uintptr_t through_in, std::uintptr_t carried_out, std::uintptr_t through_out, std::uintptr_t u,
                   const Array3& u_strides, std::uintptr_t h0, std::uintptr_t grad_u, std::uintptr_t iterations,
                   const Array4& sizes, const std::string& nonlinearity, const std::string& inverse,
                   const std::string& update, double step, double clip, double reg, double rtol, std::ptrdiff_t first,
                   int threads) {
    Unsolved unsolved = {};
    for_dtype(is_double, [&](auto zero) {
        using T = decltype(zero);
        launch(launchers<T>().rnn_backward, RnnBackward<T>{at<const T>(grad_h),
                                                           strides(grad_h_strides),
                                                           at<const T>(grad_last),
                                                           at<const T>(h),
                                                           at<const T>(weight),
                                                           at<const T>(feedback),
                                                           at<const T>(carried_in),
                                                           at<const T>(through_in),
                                                           at<T>(carried_out),
                                                           at<T>(through_out),
                                                           at<const T>(u),
                                                           strides(u_strides),
                                                           at<const T>(h0),
                                                           at<T>(grad_u),
                                                           at<std::int32_t>(iterations),
                                                           &unsolved,
                                                           sizes[0],
                                                           sizes[1],
                                                           sizes[2],
                                                           sizes[3],
                                                           nonlinearity_of(nonlinearity),
                                                           inverse_of(inverse),
                                                           update_of(update),
                                                           static_cast<T>(step),
                                                           static_cast<T>(clip),
                                                           static_cast<T>(reg),
                                                           static_cast<T>(rtol),
                                                           first,
                                                           threads});
    });
    if (unsolved.residual == 0) return py::none();
    return py::make_tuple(unsolved.t, unsolved.b, unsolved.head, unsolved.residual);
}

void gru_fwd(bool is_double, std::uintptr_t u, const Array2& u_strides, std::uintptr_t weight, std::uintptr_t bias,
             std::uintptr_t h0, std::uintptr_t h, std::uintptr_t gates, const Array3& sizes, int threads) {
    for_dtype(is_double, [&](auto zero) {
        using T = decltype(zero);
        launch(launchers<T>().gru_forward, GruForward<T>{at<const T>(u),
                                                         {u_strides[0], u_strides[1]},
                                                         at<const T>(weight),
                                                         at<const T>(bias),
                                                         at<const T>(h0),
                                                         at<T>(h),
                                                         at<T>(gates),
                                                         sizes[0],
                                                         sizes[1],
                                                         sizes[2],
                                                         threads});
    });
}

// Where the solve of "jacobian" gave up, (step, sample, relative residual); None where it did not.
py::object gru_bwd(bool is_double, std::uintptr_t grad_h, const Array2& grad_h_strides, std::uintptr_t grad_last,
                   std::uintptr_t h, std::uintptr_t gates, std::uintptr_t weight, std::uintptr_t feedback,
                   std::uintptr_t h0, std::uintptr_t grad_u, std::uintptr_t grad_h0, const Array3& sizes,
                   const std::string& inverse, const std::string& update, double step, double clip, double reg,
                   double rtol, int threads) {
    Unsolved unsolved = {};
    for_dtype(is_double, [&](auto zero) {
        using T = decltype(zero);
        launch(launchers<T>().gru_backward, GruBackward<T>{at<const T>(grad_h),
                                                           {grad_h_strides[0], grad_h_strides[1]},
                                                           at<const T>(grad_last),
                                                           at<const T>(h),
                                                           at<const T>(gates),
                                                           at<const T>(weight),
                                                           at<const T>(feedback),
                                                           at<const T>(h0),
                                                           at<T>(grad_u),
                                                           at<T>(grad_h0),
                                                           &unsolved,
                                                           sizes[0],
                                                           sizes[1],
                                                           sizes[2],
                                                           inverse_of(inverse),
                                                           update_of(update),
                                                           static_cast<T>(step),
                                                           static_cast<T>(clip),
                                                           static_cast<T>(reg),
                                                           static_cast<T>(rtol),
                                                           threads});
    });
    if (unsolved.residual == 0) return py::none();
    return py::make_tuple(unsolved.t, unsolved.b, unsolved.residual);
}

// Whether any of a batch's flags is set.
bool any(std::uintptr_t flags, std::ptrdiff_t count) {
    const bool* first = at<const bool>(flags);
    return std::any_of(first, first + count, [](bool flag) { return flag; });
}

bool regularized_solve(bool is_double, std::uintptr_t weight, std::uintptr_t rhs, double reg, std::uintptr_t solved,
                       std::uintptr_t failed, const Array3& sizes, int threads) {
    for_dtype(is_double, [&](auto zero) {
        using T = decltype(zero);
        launch(launchers<T>().regularized_solve,
               RegularizedSolve<T>{at<const T>(weight), at<const T>(rhs), static_cast<T>(reg), at<T>(solved),
                                   at<bool>(failed), sizes[0], sizes[1], sizes[2], threads});
    });
    return any(failed, sizes[0]);
}

bool regularized_polar(std::uintptr_t weight, double reg, std::uintptr_t polar, std::uintptr_t failed,
                       const Array3& sizes, int threads) {
    launch(isa_level().regularized_polar, RegularizedPolar{at<const float>(weight), reg, at<float>(polar),
                                                           at<bool>(failed), sizes[0], sizes[1], sizes[2], threads});
    return any(failed, sizes[0]);
}

double multiply_add_loop(bool is_double, long iterations) {
    py::gil_scoped_release release;
    return is_double ? launchers<double>().multiply_add_loop(iterations)
                     : launchers<float>().multiply_add_loop(iterations);
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = TPK_COMPILER;
    info["flags"] = TPK_FLAGS;
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    return info;
}

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const IsaLevel* const* level = isa_levels(); *level; ++level) names.push_back((*level)->name);
    return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels. Takes addresses: call them through tp_kernels, which checks the tensors.";
    m.def("rnn_fwd", &rnn_fwd, py::kw_only(), py::arg("double"), py::arg("input"), py::arg("input_strides"),
          py::arg("projection"), py::arg("bias"), py::arg("projected"), py::arg("weight"), py::arg("h0"), py::arg("h"),
          py::arg("sizes"), py::arg("nonlinearity"), py::arg("threads"));
    m.def("rnn_bwd", &rnn_bwd, py::kw_only(), py::arg("double"), py::arg("grad_h"), py::arg("grad_h_strides"),
          py::arg("grad_last"), py::arg("h"), py::arg("weight"), py::arg("feedback"), py::arg("carried_in"),
          py::arg("through_in"), py::arg("carried_out"), py::arg("through_out"), py::arg("u"), py::arg("u_strides"),
          py::arg("h0"), py::arg("grad_u"), py::arg("iterations"), py::arg("sizes"), py::arg("nonlinearity"),
          py::arg("inverse"), py::arg("update"), py::arg("step"), py::arg("clip"), py::arg("reg"), py::arg("rtol"),
          py::arg("first"), py::arg("threads"));
    m.def("gru_fwd", &gru_fwd, py::kw_only(), py::arg("double"), py::arg("u"), py::arg("u_strides"), py::arg("weight"),
          py::arg("bias"), py::arg("h0"), py::arg("h"), py::arg("gates"), py::arg("sizes"), py::arg("threads"));
    m.def("gru_bwd", &gru_bwd, py::kw_only(), py::arg("double"), py::arg("grad_h"), py::arg("grad_h_strides"),
          py::arg("grad_last"), py::arg("h"), py::arg("gates"), py::arg("weight"), py::arg("feedback"), py::arg("h0"),
          py::arg("grad_u"), py::arg("grad_h0"), py::arg("sizes"), py::arg("inverse"), py::arg("update"),
          py::arg("step"), py::arg("clip"), py::arg("reg"), py::arg("rtol"), py::arg("threads"));
    m.def("regularized_solve", &regularized_solve, py::kw_only(), py::arg("double"), py::arg("weight"), py::arg("rhs"),
          py::arg("reg"), py::arg("solved"), py::arg("failed"), py::arg("sizes"), py::arg("threads"));
    m.def("regularized_polar", &regularized_polar, py::kw_only(), py::arg("weight"), py::arg("reg"), py::arg("polar"),
          py::arg("failed"), py::arg("sizes"), py::arg("threads"));
    m.def("multiply_add_loop", &multiply_add_loop, py::kw_only(), py::arg("double"), py::arg("iterations"),
          "Fused multiply-adds on registers only; returns how many floating-point operations that took.");
    m.def("build_info", &build_info);
    m.def("isa_levels", &level_names, "Instruction sets compiled in that this processor has, best first.");
    m.def("isa_level", [] { return isa_level().name; }, "The instruction set in use.");
    m.def("set_isa_level", [](const std::string& name) {
        if (!set_isa_level(name.c_str())) throw py::value_error("no instruction set '" + name + "' on this machine");
    });
}
