// The kernels as a Python module, one for each instruction set: LORQ_MODULE is its name.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <string>
#include <tuple>

#include "gguf.hpp"
#include "operator.hpp"
#include "rotation.hpp"
#include "rounding.hpp"
#include "trellis.hpp"
#include "trellis_product.hpp"

namespace nb = nanobind;
using namespace lorq;

namespace {

using Pointer = uintptr_t;
using Stored = std::tuple<Pointer, int, Pointer>;  // data, type, scale; zeros where there is nothing

Factor factor(const Stored& s) {
    return {reinterpret_cast<const void*>(std::get<0>(s)), Type(std::get<1>(s)),
            reinterpret_cast<const uint16_t*>(std::get<2>(s))};
}

template <class T>
const T* at(Pointer p) { return reinterpret_cast<const T*>(p); }

// A weight that the operator knows for as long as this lives.
class Kept {
   public:
    Kept(const Weight& w, int bits, const std::array<Pointer, OPERANDS>& addresses) {
        Remembered r{w, bits, {}};
        for (size_t i = 0; i < OPERANDS; ++i) r.operands[i] = at<void>(addresses[i]);
        known_ = std::make_shared<const Remembered>(r);
        Memory::get().keep(known_);
    }
    ~Kept() { Memory::get().forget(known_.get()); }
    Kept(const Kept&) = delete;

   private:
    std::shared_ptr<const Remembered> known_;
};

// The best instruction set of this machine that a module is built for.
std::string best() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
        return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") ? "vbmi" : "vnni";
    if (avx2) return "avx2";
#endif
    return "portable";
}

}  // namespace

// What the functions below take and give: one more with every change of it, here and in src/lorq/kernels/cpu.py.
constexpr int INTERFACE = 3;

NB_MODULE(LORQ_MODULE, m) {
    m.attr("interface") = INTERFACE;
    nb::set_leak_warnings(false);  // compiled programs keep weights until the process ends
    m.def("best", &best);
    m.def(
        "rotate",
        [](Pointer x, Pointer y, int64_t tokens, int64_t in, int type, Pointer permutation, int index_bytes, int64_t block,
           int64_t skip, bool inverse, int threads) {
            return rotate({at<void>(x), at<void>(permutation), reinterpret_cast<void*>(y), tokens, in, block, skip,
                           Type(type), index_bytes, inverse}, threads);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "encode_trellis",
        [](Pointer columns, Pointer scale, Pointer upper, Pointer values, Pointer codes, Pointer errors, int64_t count,
           int64_t rows, int64_t length, int bits, int window, int threads) {
            TrellisBlock block{reinterpret_cast<float*>(columns), at<float>(scale), at<float>(upper), at<float>(values),
                               reinterpret_cast<uint8_t*>(codes), reinterpret_cast<float*>(errors), count, rows, length,
                               bits, window};
            encode_trellis(block, threads);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "encode_integers",
        [](Pointer columns, Pointer upper, Pointer hessian, Pointer shares, Pointer scale, Pointer zero, Pointer codes,
           Pointer errors, int64_t count, int64_t rows, int64_t group, int64_t trials, int bits, bool symmetric,
           bool saturate, bool given, int threads) {
            IntegerBlock block{at<float>(columns), at<float>(upper), at<float>(hessian), at<float>(shares),
                               reinterpret_cast<float*>(scale), reinterpret_cast<float*>(zero),
                               reinterpret_cast<uint8_t*>(codes), reinterpret_cast<float*>(errors), count, rows, group,
                               trials, bits, symmetric, saturate, given};
            encode_integers(block, threads);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "search_groups",
        [](Pointer weight, Pointer step, Pointer low, Pointer upper, Pointer levels, Pointer codes, Pointer best, Pointer costs,
           int64_t groups, int64_t size, int64_t trials, int64_t rows, int zero, int top, int threads) {
            GroupSearch search{at<float>(weight), at<float>(step), at<float>(low), at<float>(upper), at<float>(levels),
                               reinterpret_cast<float*>(codes), reinterpret_cast<int64_t*>(best),
                               reinterpret_cast<float*>(costs), groups, size, trials, rows, zero, top};
            search_groups(search, threads);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def("implement_operator", [](const std::string& torch_library, int64_t few_tokens, int64_t few_others) {
        return implement_operator(torch_library.c_str(), few_tokens, few_others);
    });
    m.def("keep_one_byte", [](bool one) { Torch::get().one_byte = one; });
    nb::class_<Kept>(m, "Kept").def(nb::init<const Weight&, int, const std::array<Pointer, OPERANDS>&>());
    nb::class_<Weight>(m, "Weight")
        .def(
            "__init__",
            [](Weight* w, int64_t out, int64_t in, int bits, int vector, int64_t words, int64_t group_size, Pointer packed,
               Pointer scale, Pointer zero, Pointer levels, Stored scale_left, Stored scale_right, int scale_rank,
               Pointer codebook, Pointer codebook_scale, int64_t codebook_rows, int64_t codebook_columns, Stored left,
               Stored right, int rank) {
                new (w) Weight{out, in, bits, vector, words, group_size, at<uint32_t>(packed), at<uint16_t>(scale),
                               at<uint32_t>(zero), at<float>(levels), factor(scale_left), factor(scale_right), scale_rank,
                               at<int8_t>(codebook), at<uint16_t>(codebook_scale), codebook_rows, codebook_columns,
                               factor(left), factor(right), rank};
            })
        .def_prop_ro("whole_numbers", [](const Weight& w) { return w.whole_numbers(); })
        .def_prop_ro("by_bytes", [](const Weight& w) { return by_bytes(w); })
        .def(
            "multiply",
            [](const Weight& w, Pointer x, Pointer y, int64_t tokens, int type, int pieces, int threads) {
                return multiply(w, at<void>(x), reinterpret_cast<void*>(y), tokens, Type(type), pieces, threads);
            },
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "multiply_experts",
            [](const Weight& w, int64_t experts, Pointer expert, Pointer x, Pointer y, int64_t tokens, int64_t places, int type,
               int pieces, Stored left, Stored right, int rank, int64_t rows, int64_t columns, Pointer cells, int threads) {
                const Shared shared{factor(left), factor(right), rank, rows, columns, at<int16_t>(cells)};
                return multiply_experts(w, experts, at<int64_t>(expert), at<void>(x), reinterpret_cast<void*>(y), tokens,
                                        places, Type(type), pieces, shared, threads);
            },
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "decode",
            [](const Weight& w, Pointer to, int64_t first, int64_t count, int type, int threads) {
                decode(w, reinterpret_cast<void*>(to), first, count, Type(type), threads);
            },
            nb::call_guard<nb::gil_scoped_release>());
    nb::class_<TrellisWeight>(m, "TrellisWeight")
        .def(
            "__init__",
            [](TrellisWeight* w, int64_t out, int64_t in, int bits, int window, int64_t length, Pointer packed, Pointer scale,
               Stored left, Stored right, int rank) {
                new (w) TrellisWeight{out, in, bits, window, length, at<uint16_t>(packed), at<uint16_t>(scale), factor(left),
                                      factor(right), rank};
            })
        .def(
            "multiply",
            [](const TrellisWeight& w, Pointer x, Pointer y, int64_t tokens, int type, int threads) {
                return multiply(w, at<void>(x), reinterpret_cast<void*>(y), tokens, Type(type), threads);
            },
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "decode",
            [](const TrellisWeight& w, Pointer to, int64_t first, int64_t count, int type, int threads) {
                decode(w, reinterpret_cast<void*>(to), first, count, Type(type), threads);
            },
            nb::call_guard<nb::gil_scoped_release>());
}
