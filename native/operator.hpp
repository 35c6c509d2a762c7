// lorq::quant_linear as an operator of torch's, so that compiled programs call it without Python. torch's stable C
// interface is looked up at run time: lorq is compiled without torch. Weights are remembered by the addresses of their
// tensors; whatever else comes goes to lorq::quant_linear_by_python, arguments as they are.
#pragma once
#include <array>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "kernels.hpp"

namespace lorq {

constexpr size_t OPERANDS = 12;  // of the operator, between the inputs and the bits
using Addresses = std::array<const void*, OPERANDS>;

struct Remembered {
    Weight w;
    int bits;
    Addresses operands;
};

// What Python has seen and covers, by the address of the packed codes; Python forgets it when that tensor is gone.
class Memory {
   public:
    void keep(std::shared_ptr<const Remembered> r) {
        const std::unique_lock<std::shared_mutex> lock(mutex_);
        kept_.emplace(r->operands[0], std::move(r));
    }
    void forget(const Remembered* r) {
        const std::unique_lock<std::shared_mutex> lock(mutex_);
        auto [at, end] = kept_.equal_range(r->operands[0]);
        for (; at != end; ++at)
            if (at->second.get() == r) {
                kept_.erase(at);
                return;
            }
    }
    std::shared_ptr<const Remembered> find(const Addresses& operands, int64_t bits, int64_t rows) const {
        const std::shared_lock<std::shared_mutex> lock(mutex_);
        const auto [first, end] = kept_.equal_range(operands[0]);
        for (auto at = first; at != end; ++at) {
            const Remembered& r = *at->second;
            if (r.w.out == rows && r.bits == bits && r.operands == operands) return at->second;
        }
        return nullptr;
    }
    static Memory& get() {
        static Memory memory;
        return memory;
    }

   private:
    mutable std::shared_mutex mutex_;
    // By the address of the codes: a weight and the first of its parts have one address and another number of rows.
    std::unordered_multimap<const void*, std::shared_ptr<const Remembered>> kept_;
};

using Value = uint64_t;  // StableIValue: a number, a tensor's handle, or where there may be none the address of one
using Handle = struct TensorOpaque*;

struct Torch {
    int32_t (*new_library)(const char* space, const char* key, const char* file, uint32_t line, void** to) = nullptr;
    int32_t (*implement)(void* library, const char* name, void (*)(Value*, uint64_t, uint64_t)) = nullptr;
    int32_t (*call)(const char* name, const char* overload, Value* stack) = nullptr;
    int32_t (*data)(Handle, void**) = nullptr;
    int32_t (*dimensions)(Handle, int64_t*) = nullptr;
    int32_t (*sizes)(Handle, int64_t**) = nullptr;
    int32_t (*type)(Handle, int32_t*) = nullptr;
    int32_t (*contiguous)(Handle, bool*) = nullptr;
    int32_t (*new_tensor)(int64_t, const int64_t*, const int64_t*, int32_t type, int32_t device, int32_t index, Handle*) = nullptr;
    int32_t (*drop)(Handle) = nullptr;
    int32_t (*threads)(uint32_t*) = nullptr;
    int32_t (*drop_value)(Value*) = nullptr;     // may be missing: such values are then deleted as they come
    const char* (*reason)() = nullptr;           // likewise: why the last call failed
    int32_t f32 = 0, bf16 = 0, f16 = 0, cpu = 0;  // their numbers in torch
    int64_t few_tokens = 0, few_others = 0;  // multiplied here: by weights that are bytes, by others
    std::atomic<bool> one_byte{false};

    static Torch& get() {
        static Torch torch;
        return torch;
    }

    // False where this torch lacks something.
    bool load(const char* path) {
#ifdef _WIN32
        (void)path;
        return false;
#else
        void* found = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
        if (!found) return false;
        const auto look = [&](const char* name, auto& to, bool needed = true) {
            to = reinterpret_cast<std::decay_t<decltype(to)>>(dlsym(found, name));
            return to || !needed;
        };
        int32_t (*number)() = nullptr;
        const auto read = [&](const char* name, int32_t& to) {
            if (!look(name, number)) return false;
            to = number();
            return true;
        };
        return look("aoti_torch_library_init_impl", new_library) && look("aoti_torch_library_impl", implement) &&
               look("aoti_torch_call_dispatcher", call) && look("aoti_torch_get_data_ptr", data) &&
               look("aoti_torch_get_dim", dimensions) && look("aoti_torch_get_sizes", sizes) &&
               look("aoti_torch_get_dtype", type) && look("aoti_torch_is_contiguous", contiguous) &&
               look("aoti_torch_empty_strided", new_tensor) && look("aoti_torch_delete_tensor_object", drop) &&
               look("torch_get_num_threads", threads) && look("torch_delete_stable_ivalue", drop_value, false) &&
               look("torch_exception_get_what_without_backtrace", reason, false) &&
               read("aoti_torch_dtype_float32", f32) && read("aoti_torch_dtype_bfloat16", bf16) &&
               read("aoti_torch_dtype_float16", f16) && read("aoti_torch_device_type_cpu", cpu);
#endif
    }
};

inline Handle tensor_of(Value v) { return reinterpret_cast<Handle>(v); }
inline Handle optional_tensor_of(Value v) { return v ? tensor_of(*reinterpret_cast<const Value*>(v)) : nullptr; }

inline const void* address_of(const Torch& torch, Handle tensor) {
    void* p = nullptr;
    if (tensor) torch.data(tensor, &p);
    return p;
}

// The product of a remembered weight with few contiguous tokens; null for all else.
inline Handle multiply_remembered(const Torch& torch, const Value* stack) {
    Addresses operands;
    for (size_t i = 0; i < OPERANDS; ++i) operands[i] = address_of(torch, i ? optional_tensor_of(stack[1 + i]) : tensor_of(stack[1]));
    int64_t dimensions = 0, *sizes = nullptr;
    if (torch.dimensions(tensor_of(stack[1]), &dimensions) || dimensions < 1 || torch.sizes(tensor_of(stack[1]), &sizes))
        return nullptr;
    const auto known = Memory::get().find(operands, int64_t(stack[1 + OPERANDS]), sizes[0]);
    if (!known) return nullptr;
    const Handle x = tensor_of(stack[0]);
    int32_t number = 0;
    uint32_t threads = 1;
    bool contiguous = false;
    if (torch.threads(&threads) || torch.dimensions(x, &dimensions) || torch.sizes(x, &sizes) || torch.type(x, &number) ||
        torch.contiguous(x, &contiguous))
        return nullptr;
    const Type type = number == torch.f32 ? Type::f32 : number == torch.bf16 ? Type::bf16 : number == torch.f16 ? Type::f16 : Type::none;
    if (type == Type::none || !contiguous || dimensions < 1 || dimensions > 8 || sizes[dimensions - 1] != known->w.in) return nullptr;
    int64_t shape[8], strides[8], tokens = 1;
    for (int64_t d = dimensions - 1, stride = 1; d >= 0; --d) {
        shape[d] = d == dimensions - 1 ? known->w.out : sizes[d];
        tokens *= d == dimensions - 1 ? 1 : sizes[d];
        strides[d] = stride;
        stride *= shape[d];
    }
    if (tokens < 1 || tokens > (by_bytes(known->w) ? torch.few_tokens : torch.few_others)) return nullptr;
    Handle y = nullptr;
    if (torch.new_tensor(dimensions, shape, strides, number, torch.cpu, -1, &y)) return nullptr;
    const int pieces = torch.one_byte ? 1 : type == Type::f32 ? 3 : 2;
    if (multiply(known->w, address_of(torch, x), const_cast<void*>(address_of(torch, y)), tokens, type, pieces, int(threads))) return y;
    torch.drop(y);
    return nullptr;
}

// As torch calls it: arguments on a stack, which are ours to drop, and the result in their place.
inline void quant_linear(Value* stack, uint64_t, uint64_t) {
    const Torch& torch = Torch::get();
    if (const Handle y = multiply_remembered(torch, stack)) {
        torch.drop(tensor_of(stack[0]));
        torch.drop(tensor_of(stack[1]));
        for (size_t i = 2; i <= OPERANDS; ++i) {
            if (!stack[i]) continue;
            torch.drop(optional_tensor_of(stack[i]));
            if (torch.drop_value) torch.drop_value(reinterpret_cast<Value*>(stack[i]));
            else delete reinterpret_cast<Value*>(stack[i]);
        }
        stack[0] = reinterpret_cast<Value>(y);
    } else if (torch.call("lorq::quant_linear_by_python", "", stack)) {
        const char* why = torch.reason ? torch.reason() : nullptr;
        throw std::runtime_error(why ? why : "lorq::quant_linear failed");
    }
}

// Makes that torch's operator on CPUs, for up to so many tokens; false where this torch has not what it takes.
inline bool implement_operator(const char* torch_library, int64_t few_tokens, int64_t few_others) {
    Torch& torch = Torch::get();
    void* library = nullptr;
    torch.few_tokens = few_tokens;
    torch.few_others = few_others;
    return torch.load(torch_library) && !torch.new_library("lorq", "CPU", __FILE__, __LINE__, &library) &&
           !torch.implement(library, "quant_linear", quant_linear);
}

}  // namespace lorq
