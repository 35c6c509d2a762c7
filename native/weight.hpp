// A quantized weight as the checkpoint stores it, seen through pointers. Nothing is copied and nothing is laid out anew:
// the kernels read the words of docs/format.md as they are, so a layer costs no memory and no time at load.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lorq {

enum class Type : int { none, f32, bf16, f16, i8, e4m3 };

struct Factor {  // (rows, rank) or (rank, columns) with a scale for each of the ranks, or none
    const void* data = nullptr;
    Type type = Type::none;
    const uint16_t* scale = nullptr;  // float16

    // What begins at an entry and at a scale of it.
    Factor from(int64_t entry, int64_t first_scale) const {
        const int size = type == Type::f32 ? 4 : type == Type::bf16 || type == Type::f16 ? 2 : 1;
        return {static_cast<const char*>(data) + entry * size, type, scale ? scale + first_scale : nullptr};
    }
};

struct Weight {
    int64_t out = 0, in = 0;
    int bits = 0, vector = 1;
    int64_t words = 0;       // of a packed row
    int64_t group_size = 0;  // columns that share a scale; the width where the scale is low rank
    const uint32_t* packed = nullptr;
    const uint16_t* scale = nullptr;   // (out, groups) float16
    const uint32_t* zero = nullptr;    // (words, groups), packed along the rows; null: all 2^(bits-1), or levels
    const float* levels = nullptr;     // (2^bits,); null: whole numbers
    Factor scale_left, scale_right;    // (out, scale_rank), (scale_rank, in)
    int scale_rank = 0;
    const int8_t* codebook = nullptr;  // (row tiles, column tiles, entries, vector)
    const uint16_t* codebook_scale = nullptr;
    int64_t codebook_rows = 0, codebook_columns = 0;
    Factor left, right;  // (out, rank), (rank, in)
    int rank = 0;

    // Codes that stand for whole numbers under a scale for each group.
    bool whole_numbers() const { return vector == 1 && !levels && !scale_rank; }

    // The weight e after this one, of experts whose tensors lie one after the other.
    Weight expert(int64_t e) const {
        Weight own = *this;
        own.packed += e * out * words;
        own.scale += e * out * groups();
        if (zero) own.zero += e * ((out * bits + 31) / 32) * groups();
        if (codebook) {
            const int64_t tiles = out / codebook_rows * (in / codebook_columns);
            own.codebook += e * (tiles << (bits * vector)) * vector;
            own.codebook_scale += e * tiles;
        }
        return own;
    }
    int64_t groups() const { return in / group_size; }
    const uint8_t* row(int64_t o) const { return reinterpret_cast<const uint8_t*>(packed + o * words); }
};

}  // namespace lorq
