// How the arguments of both modules arrive: addresses, sizes and words.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "recurrence/call.h"

namespace py = pybind11;

namespace tpk {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Array3 = std::array<std::ptrdiff_t, 3>;
using Array4 = std::array<std::ptrdiff_t, 4>;

template <class Call>
Call call_of(const Array4& sizes) {
    Call f = {};
    f.T_ = sizes[0], f.B = sizes[1], f.H = sizes[2], f.N = sizes[3];
    return f;
}

// What a field of recurrence/call.h arrives as.
namespace arguments {

using Input = std::uintptr_t;
using Output = std::uintptr_t;
using Counter = std::uintptr_t;
using Residuals = std::uintptr_t;
using Strides = const Array3&;
using Size = std::ptrdiff_t;
using Count = int;
using Flag = bool;
using Flags = std::uintptr_t;
using Offsets = std::uintptr_t;
using Number = double;
using CellName = const std::string&;
using Inverse = const std::string&;
using Update = const std::string&;

}  // namespace arguments

// The struct's fields as parameters, as keywords, and put into `f`. `function`: the caller's name, for errors.
#define TPK_PARAMETER(kind, name) , arguments::kind name
#define TPK_KEYWORD(kind, name) , py::arg(#name)
#define TPK_FILL(kind, name) fill(f.name, name, function, #name);

template <class Word>
void fill_word(Word& field, const std::string& value, const char* function, const char* argument,
               std::initializer_list<std::pair<const char*, Word>> words) {
    std::string names;
    for (const auto& [name, word] : words) {
        if (value == name) {
            field = word;
            return;
        }
        names += names.empty() ? "'" : ", '";
        names += std::string(name) + "'";
    }
    throw py::value_error(std::string(function) + ": " + argument + " must be one of " + names + ", got '" + value +
                          "'");
}

inline void fill(CellName& field, const std::string& value, const char* function, const char* argument) {
    fill_word(field, value, function, argument,
              {{"rnn_tanh", CellName::rnn_tanh},
               {"rnn_relu", CellName::rnn_relu},
               {"rnn_identity", CellName::rnn_identity},
               {"gru", CellName::gru},
               {"lstm", CellName::lstm}});
}

inline void fill(Inverse& field, const std::string& value, const char* function, const char* argument) {
    fill_word(field, value, function, argument,
              {{"none", Inverse::none},
               {"identity", Inverse::identity},
               {"weight", Inverse::weight},
               {"layer", Inverse::layer},
               {"jacobian", Inverse::jacobian},
               {"difference", Inverse::difference},
               {"direct", Inverse::direct}});
}

inline void fill(Update& field, const std::string& value, const char* function, const char* argument) {
    fill_word(field, value, function, argument, {{"total", Update::total}, {"local", Update::local}});
}

inline void fill(Strides& field, const Array3& value, const char*, const char*) {
    field = {value[0], value[1], value[2]};
}

template <class T>
void fill(T*& field, std::uintptr_t address, const char*, const char*) {
    field = at<T>(address);
}

template <class Number>
void fill(Number& field, Number value, const char*, const char*) {
    field = value;
}

inline void fill(float& field, double value, const char*, const char*) { field = static_cast<float>(value); }

}  // namespace tpk
