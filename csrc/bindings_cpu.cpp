// tp_kernels._cpu: one function a launcher, taking addresses and sizes. Python checks and keeps the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <new>
#include <string>
#include <vector>

#include "bindings.h"
#include "common/interrupt.h"
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

// Runs the handlers of signals that have come; whether one of them raised, as that of Ctrl-C does.
bool signal_raised() {
    const py::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

template <class Arguments>
void launch(bool (*launcher)(const Arguments&), const Arguments& arguments) {
    bool there_was_memory, stopped;
    {
        const py::gil_scoped_release release;
        const Interruptible call(signal_raised);
        there_was_memory = launcher(arguments);
        stopped = call.stopped();
    }
    if (stopped) throw py::error_already_set();
    if (!there_was_memory) throw std::bad_alloc();
}

template <class F>
void for_dtype(bool is_double, F f) {
    if (is_double)
        f(double{});
    else
        f(float{});
}

void check(bool holds, const char* function, const std::string& what) {
    if (!holds) throw std::invalid_argument(std::string(function) + ": " + what);
}

#define TPK_FORWARD_FIELDS(USE) TPK_RECURRENCE_FORWARD(USE, USE, TPK_NO_FIELD)
#define TPK_BACKWARD_FIELDS(USE) TPK_RECURRENCE_BACKWARD(USE, USE, TPK_NO_FIELD, TPK_NO_FIELD)

void recurrence_fwd(bool is_double, const Array4& sizes TPK_FORWARD_FIELDS(TPK_PARAMETER)) {
    constexpr const char* function = "recurrence_fwd";
    for_dtype(is_double, [&](auto zero) {
        using T = decltype(zero);
        auto f = call_of<RecurrenceForwardCpu<T>>(sizes);
        TPK_FORWARD_FIELDS(TPK_FILL)
        const bool gru = f.cell == CellName::gru, gated = gru || f.cell == CellName::lstm;
        check(!(f.projection && gru), function, "projection must be 0 with cell 'gru'");
        check(!(f.projection && f.H != 1), function, "projection must be 0 with more heads than one");
        check(gru || !f.bias, function, "bias must be 0 with cell '" + cell + "'");
        check(gated || !f.kept, function, "kept must be 0 with cell '" + cell + "'");
        check(f.last || f.B == 0, function, "last is missing");
        launch(launchers<T>().recurrence_forward, f);
    });
}

// Where the solve of "jacobian" gave up, (step, sample, head, relative residual); None where it did not.
py::object recurrence_bwd(bool is_double, const Array4& sizes TPK_BACKWARD_FIELDS(TPK_PARAMETER)) {
    constexpr const char* function = "recurrence_bwd";
    Unsolved unsolved = {};
    for_dtype(is_double, [&](auto zero) {
        using T = decltype(zero);
        auto f = call_of<RecurrenceBackward<T>>(sizes);
        TPK_BACKWARD_FIELDS(TPK_FILL)
        f.unsolved = &unsolved;
        const bool of_elman = f.inverse == Inverse::difference || f.inverse == Inverse::direct;
        const bool not_of_lstm = of_elman || f.inverse == Inverse::layer || f.inverse == Inverse::jacobian;
        check(!(f.cell == CellName::gru && of_elman || f.cell == CellName::lstm && not_of_lstm), function,
              "there is no inverse '" + inverse + "' of cell '" + cell + "'");
        launch(launchers<T>().recurrence_backward, f);
    });
    if (unsolved.residual == 0) return py::none();
    return py::make_tuple(unsolved.t, unsolved.b, unsolved.head, unsolved.residual);
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
    m.def("recurrence_fwd", &recurrence_fwd, py::kw_only(), py::arg("double"),
          py::arg("sizes") TPK_FORWARD_FIELDS(TPK_KEYWORD));
    m.def("recurrence_bwd", &recurrence_bwd, py::kw_only(), py::arg("double"),
          py::arg("sizes") TPK_BACKWARD_FIELDS(TPK_KEYWORD));
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
