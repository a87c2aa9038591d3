// Launch settings of mul_vec_id.cu.
#pragma once
#include "mul_tile.h"

namespace ggml_tp {

constexpr i64 kVecIdMostTokens = 16;

inline const char* mul_vec_id_kernel(i32 type) {
    struct Row {
        i32 type;
        const char* kernel;
    };
#define TP_ROW(name, type) {type, "mul_vec_id_" #name},
    static constexpr Row kRows[] = {TP_PIECE_TYPES(TP_ROW) TP_ROW(f32, kF32) TP_ROW(f16, kF16) TP_ROW(bf16, kBF16)};
#undef TP_ROW
    for (const Row& row : kRows)
        if (row.type == type) return row.kernel;
    return nullptr;
}

/// Whether a product of experts is the kind that mul_vec_id computes: repacked, whole 16-byte pieces in each row, few tokens.
inline bool mul_vec_id_can(const MulIdArgs& a, Arch arch) {
    const WeightFormat* format = find_weight_format(a.w.type);
    const bool once = !a.ids.data && a.y.ne[1] * a.y.ne[2] == a.w.ne2;  // every matrix is read for one row
    const i64 most = only_pieces(a.w.type, arch) || once ? 65535 : kVecIdMostTokens;
    if (!format || !mul_vec_id_kernel(a.w.type) || !a.w.repacked || a.y.ne[2] > most || a.y.ne[1] > kVecSlots || a.y.type != kF32 || a.x.type != kF32)
        return false;
    if (a.y.nb[0] != 4 || a.w.ne3 != 1 || a.ids.type != kI32 || a.x.ne[1] < 1 || a.y.ne[1] % a.x.ne[1]) return false;
    if (format->block_elems > 1) return true;
    return a.w.row_stride % 16 == 0 && a.x.nb[0] == 4 && a.x.nb[1] % 16 == 0 && a.x.nb[2] % 16 == 0 && (u64)a.x.data % 16 == 0 && a.k_begin == 0;
}

inline MulVecIdArgs mul_vec_id_args(const MulIdArgs& a) {
    MulVecIdArgs v{};
    v.part[0] = {a.w, a.y};
    v.n_parts = 1;
    v.x = a.x;
    v.ids = a.ids;
    v.xq = a.xq;
    v.xd = a.xd;
    v.k = a.w.k;
    v.fault = a.fault;
    return v;
}

/// What a part comes to, with its bias.
inline const View& mul_vec_id_result(const MulVecIdArgs& a, int part) { return a.bias[part].y.data ? a.bias[part].y : a.part[part].y; }

inline Launch mul_vec_id_launch(const MulVecIdArgs& a, Arch) {
    Launch out;
    out.kernel = mul_vec_id_kernel(a.part[0].w.type);
    out.grid[0] = 0;
    for (int i = 0; i < a.n_parts; ++i) out.grid[0] += (u32)((a.part[i].w.n + kVecRows - 1) / kVecRows);
    out.grid[1] = (u32)a.part[0].y.ne[2];
    out.block[0] = 32;
    out.block[1] = (u32)a.part[0].y.ne[1];
    return out;
}

}  // namespace ggml_tp
