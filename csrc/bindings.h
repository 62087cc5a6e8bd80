// How the arguments of both modules arrive: addresses, sizes and words.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "rnn/kernel.h"

namespace py = pybind11;

namespace tpk {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Array2 = std::array<std::ptrdiff_t, 2>;
using Array3 = std::array<std::ptrdiff_t, 3>;
using Array4 = std::array<std::ptrdiff_t, 4>;

inline Strides strides(const Array3& s) { return {s[0], s[1], s[2]}; }

template <class Word>
Word word(const char* argument, const std::string& value, std::initializer_list<std::pair<const char*, Word>> words) {
    for (const auto& [name, result] : words)
        if (value == name) return result;
    throw py::value_error(std::string("unknown ") + argument + " '" + value + "'");
}

inline Nonlinearity nonlinearity_of(const std::string& value) {
    return word<Nonlinearity>(
        "nonlinearity", value,
        {{"tanh", Nonlinearity::tanh}, {"relu", Nonlinearity::relu}, {"identity", Nonlinearity::identity}});
}

inline Inverse inverse_of(const std::string& value) {
    return word<Inverse>("inverse", value,
                         {{"none", Inverse::none},
                          {"identity", Inverse::identity},
                          {"weight", Inverse::weight},
                          {"layer", Inverse::layer},
                          {"jacobian", Inverse::jacobian},
                          {"difference", Inverse::difference},
                          {"direct", Inverse::direct}});
}

inline Update update_of(const std::string& value) {
    return word<Update>("update", value, {{"total", Update::total}, {"local", Update::local}});
}

}  // namespace tpk
