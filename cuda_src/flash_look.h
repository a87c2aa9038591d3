// What attention of many rows (flash_tile.cu, flash_wide.cu) does with scores and masks: which steps of cells a block's tokens see.
#pragma once
#include "flash_attn.h"

#if TP_ARCH >= 800

namespace ggml_tp {

TP_DEVICE u32 pack(float low, float high) { return (u32)tp_float_to_half(low) | (u32)tp_float_to_half(high) << 16; }

constexpr u16 kClosed = 0xfc00;  // -inf: a cell that a token does not see
constexpr float kLog2E = 1.44269504088896340736f;

/// cap * tanh(score), as a power of 2. tanh(s) is 1 - 2 / (e^2s + 1): off by 1e-7 of the cap, which is what a sum of halves' products is off by.
TP_DEVICE float capped(float score, float cap) { return cap * kLog2E * (1.0f - __fdividef(2.0f, tp_exp2(2.0f * kLog2E * score) + 1.0f)); }

/// Of cells `cell` and `cell + 1`, an even one and the next: 0 without a mask, kClosed beyond the last of n_kv.
TP_DEVICE u32 mask_of_two(const char* row, int cell, int n_kv) {
    if (cell + 1 < n_kv) return row ? *(const u32*)(row + (i64)cell * 2) : 0u;
    if (cell < n_kv) return (row ? *(const u16*)(row + (i64)cell * 2) : 0u) | (u32)kClosed << 16;
    return kClosed | (u32)kClosed << 16;
}

struct SeenStep {
    int number;
    bool mixed;  // some value is not 0, or a cell lies beyond the last
};
/// The steps of kCells cells that some of a block's tokens see, one after the other. Its kWarps warps look at the masks of a window of kFlashTileWindow steps
/// together; all of them call next() alike.
template <int kCells, int kWarps>
struct SeenSteps {
    const char* mask;  // of the stream's first token; null: all is seen
    i64 row_bytes;
    int token0, tokens, n_tokens, n_kv, n_steps;
    u32* looks;  // shared: 2 * 2 * kWarps words
    int thread;
    u32 open, mixed;  // bits of the window's steps
    int window;
    TP_MEMBER SeenSteps(const char* mask, i64 row_bytes, int token0, int tokens, int n_tokens, int n_kv, int n_steps, u32* looks, int thread)
        : mask(mask),
          row_bytes(row_bytes),
          token0(token0),
          tokens(tokens),
          n_tokens(n_tokens),
          n_kv(n_kv),
          n_steps(n_steps),
          looks(looks),
          thread(thread),
          open(0),
          mixed(0),
          window(-1) {}
    TP_MEMBER void look(int next) {
        const int lane = thread % 32, warp = thread / 32;
        window = next;
        const int left = n_steps - window * kFlashTileWindow;  // steps, at least one
        const u32 there = left < kFlashTileWindow ? (1u << left) - 1 : ~0u;
        const u32 ragged = n_kv % kCells && left <= kFlashTileWindow ? 1u << (left - 1) : 0u;
        open = mask ? 0u : there, mixed = ragged;
        if (!mask) return;
        // A warp reads 256 cells of 8 tokens at a time: all loads are under way together, and a lane has cells of one step.
        constexpr int kLanes = kCells / 8, kSteps = 32 / kLanes, kGroups = kFlashTileWindow / kSteps, kLook = 8;
        u32 seen = 0, other = 0;
        for (int i = warp; i < kGroups * ((tokens + kLook - 1) / kLook); i += kWarps) {
            const int group = i % kGroups, token = token0 + i / kGroups * kLook;
            const int cell = window * kFlashTileWindow * kCells + group * 256 + lane * 8;
            const char* from = mask + token * row_bytes + (i64)cell * 2;
            const bool whole = cell + 8 <= n_kv;
            TpInt4 eight[kLook];
#pragma unroll
            for (int row = 0; row < kLook; ++row) eight[row] = tp_load_in_order(from + row * row_bytes, whole && token + row < n_tokens);
            u32 not_closed = 0, not_zero = 0;
#pragma unroll
            for (int row = 0; row < kLook; ++row) {
                if (token + row >= n_tokens) break;
                constexpr int kTwo = (int)(kClosed | (u32)kClosed << 16);
                if (whole) not_closed |= (u32)((eight[row].x ^ kTwo) | (eight[row].y ^ kTwo) | (eight[row].z ^ kTwo) | (eight[row].w ^ kTwo));
                if (whole) not_zero |= (u32)(eight[row].x | eight[row].y | eight[row].z | eight[row].w);
                for (int e = 0; !whole && cell + e < n_kv; ++e) not_closed |= (u32)(*(const u16*)(from + row * row_bytes + e * 2) ^ kClosed);
            }
            const u32 lanes_seen = __ballot_sync(0xffffffffu, not_closed != 0), lanes_other = __ballot_sync(0xffffffffu, not_zero != 0);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                constexpr u32 kOne = (1u << kLanes) - 1;
                seen |= (u32)((lanes_seen >> step * kLanes & kOne) != 0) << (group * kSteps + step);
                other |= (u32)((lanes_other >> step * kLanes & kOne) != 0) << (group * kSteps + step);
            }
        }
        // Windows take turns: who writes a window's words is behind the barrier of the one before, and all had read these words before that.
        u32* words = looks + window % 2 * 2 * kWarps;
        if (lane == 0) words[warp] = seen, words[kWarps + warp] = other;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < kWarps; ++w) open |= words[w], mixed |= words[kWarps + w];
    }
    /// The first of them from `step` on; n_steps: none.
    TP_MEMBER SeenStep next(int step) {
        while (step < n_steps) {
            if (step / kFlashTileWindow != window) look(step / kFlashTileWindow);
            const u32 ahead = open >> step % kFlashTileWindow;
            if (ahead) {
                step += __ffs((int)ahead) - 1;
                return {step, (mixed >> step % kFlashTileWindow & 1) != 0};
            }
            step = (step / kFlashTileWindow + 1) * kFlashTileWindow;
        }
        return {n_steps, false};
    }
};

}  // namespace ggml_tp

#endif
